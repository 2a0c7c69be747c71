import contextlib
import os
import stat

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from onebase.errors import FileFormatError
from onebase.files.tensor_file import read_tensors, write_tensors
from tests.files.samples import pairs, same

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool]


@given(
    st.dictionaries(
        st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), min_size=1, max_size=9).filter(
            lambda name: name != "__metadata__"
        ),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=3)),
        max_size=5,
    ),
    st.randoms(use_true_random=False),
)
def test_tensors_of_any_dtype_and_shape_come_back_and_their_order_does_not_matter(tmp_path_factory, layout, random):
    tensors = {name: torch.ones(shape).to(dtype) for name, (dtype, shape) in layout.items()}
    shuffled = dict(random.sample(list(tensors.items()), len(tensors)))
    folder = tmp_path_factory.mktemp("tensors")
    first = write_tensors(folder / "a.safetensors", tensors)
    second = write_tensors(folder / "b.safetensors", shuffled)
    assert first == second
    assert (folder / "a.safetensors").read_bytes() == (folder / "b.safetensors").read_bytes()
    assert same(read_tensors(folder / "a.safetensors", todo=""), tensors)


def test_views_transposes_and_tensors_that_share_memory_are_written_as_they_look(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    tensors = {"whole": whole, "turned": whole.T, "part": whole[1:2], "again": whole, "trained": whole.requires_grad_()}
    write_tensors(tmp_path / "t.safetensors", tensors)
    assert same(read_tensors(tmp_path / "t.safetensors", todo=""), {name: t.detach() for name, t in tensors.items()})


def test_what_was_read_does_not_change_with_the_file(tmp_path):
    write_tensors(tmp_path / "t.safetensors", pairs())
    read = read_tensors(tmp_path / "t.safetensors", todo="")
    write_tensors(tmp_path / "t.safetensors", pairs(seed=1))
    assert same(read, dict(sorted(pairs().items())))


def test_others_may_read_the_file_as_the_users_mask_has_it(tmp_path):
    write_tensors(tmp_path / "t.safetensors", pairs())
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE((tmp_path / "t.safetensors").stat().st_mode) == 0o666 & ~mask


@pytest.mark.parametrize("cut", [0, 7, 60, -1])
def test_a_file_that_is_cut_off_is_refused_with_what_to_do(tmp_path, cut):
    path = tmp_path / "t.safetensors"
    write_tensors(path, pairs())
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(FileFormatError, match=r"t\.safetensors: damaged, or no safetensors file .* Do this\."):
        read_tensors(path, todo="Do this.")


@given(st.binary(max_size=200))
def test_no_bytes_make_anything_but_tensors_or_our_error(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("bytes") / "t.safetensors"
    path.write_bytes(data)
    with contextlib.suppress(FileFormatError):
        read_tensors(path, todo="")
