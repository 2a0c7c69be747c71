import json
import math
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.save_and_load import get_peft_model_state_dict
from safetensors.torch import save_file

from onebase.adapters.matching import for_path
from onebase.config.methods import Lora
from onebase.errors import CapacityError, ConfigError, FileFormatError
from onebase.files import tensor_file
from onebase.files.method_format import Placement
from onebase.files.peft_config import read_config, stored_targets, targets_of
from onebase.files.peft_format import find_adapter, read_adapter, write_adapter
from onebase.files.target_names import name_targets
from tests.files.killing import killed_everywhere
from tests.files.samples import PATHS, TARGETS, pairs, record, same, tiny_llama

CASES = {
    "plain names": {"target_modules": ["q_proj", "v_proj"]},
    "regular expression": {"target_modules": r"model\.layers\.[02]\.(self_attn|mlp)\.(q|up)_proj"},
    "all-linear": {"target_modules": "all-linear", "lora_alpha": 7},
    "exclusions": {"target_modules": "all-linear", "exclude_modules": ["lm_head", "0.mlp.up_proj", "k_proj"]},
    "layers": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1, 3], "layers_pattern": "layers"},
    "ranks and alphas by pattern": {
        "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {"up_proj": 2, r"layers\.1\.self_attn\.q_proj": 5, "q_proj": 3},
        "alpha_pattern": {r".*\.0\..*": 2.5, "^model.layers.1.*": 12, "q_proj": 1},
        "use_rslora": True,
    },
}


pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in tiny"),
]


def peft_adapter(model, settings):
    """Put an adapter of PEFT's on a model, with weights that are all different from zero."""
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 8, **settings}))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    return wrapped


def peft_scalings(wrapped):
    layers = wrapped.base_model.model.named_modules()
    return {path: layer.scaling["default"] for path, layer in layers if hasattr(layer, "lora_A")}


def scalings(settings, paths):
    """What the settings say each module's scaling is."""

    def one(path: str) -> float:
        r = for_path(settings.rank_pattern, path, settings.r)
        alpha = for_path(settings.alpha_pattern, path, settings.lora_alpha)
        return alpha / math.sqrt(r) if settings.use_rslora else alpha / r

    return {path: one(path) for path in paths}


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_an_adapter_that_peft_wrote_is_read_with_its_tensors_and_scalings(tmp_path, settings):
    wrapped = peft_adapter(tiny_llama(), settings)
    wrapped.save_pretrained(tmp_path)
    stored = read_adapter(tmp_path)
    expected = get_peft_model_state_dict(wrapped)
    assert same(stored.tensors, {key.removeprefix("base_model.model."): expected[key] for key in sorted(expected)})
    assert scalings(stored.settings, stored.module_paths) == pytest.approx(peft_scalings(wrapped))
    assert stored.record is None
    assert [note for note in stored.notes if "onebase.json" not in note] == []


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_an_adapter_that_we_wrote_is_opened_by_peft_with_its_tensors_and_scalings(tmp_path, settings):
    like = peft_adapter(tiny_llama(), settings)
    tensors = {key.removeprefix("base_model.model."): tensor for key, tensor in get_peft_model_state_dict(like).items()}
    ours = Lora(**{"r": 4, "lora_alpha": 8, **settings})
    model = tiny_llama()
    paths = {name.rsplit(".", 2)[0] for name in tensors}
    targets = name_targets(paths, [name for name, _ in model.named_modules()], targets_of(ours))
    write_adapter(tmp_path / "a", ours, tensors, placement=placed(targets, paths), base_path="tiny", record=record())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # missing or unexpected keys
        opened = PeftModel.from_pretrained(model, tmp_path / "a")
    assert same(
        {key.removeprefix("base_model.model."): tensor for key, tensor in get_peft_model_state_dict(opened).items()},
        tensors,
    )
    assert peft_scalings(opened) == peft_scalings(like)
    ids = torch.arange(12).reshape(2, 6)
    assert torch.equal(opened(ids).logits, like.eval()(ids).logits)


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_an_adapter_of_ours_that_peft_saved_again_reads_the_same(tmp_path, settings):
    like = peft_adapter(tiny_llama(), settings)
    like.save_pretrained(tmp_path / "peft")
    first = read_adapter(tmp_path / "peft")
    model = tiny_llama()
    targets = name_targets(first.module_paths, [name for name, _ in model.named_modules()], targets_of(first.settings))
    write_adapter(
        tmp_path / "a",
        first.settings,
        first.tensors,
        placement=placed(targets, first.module_paths),
        base_path="tiny",
        record=record(),
    )
    PeftModel.from_pretrained(model, tmp_path / "a").save_pretrained(tmp_path / "again")
    again = read_adapter(tmp_path / "again")
    assert same(again.tensors, first.tensors)
    assert scalings(again.settings, again.module_paths) == scalings(first.settings, first.module_paths)


def placed(targets=TARGETS, paths=PATHS):
    return Placement(targets, tuple(sorted(paths)))


def write(folder, tensors=None, *, settings=None, fill=None, **changes):
    chosen = settings or Lora(r=4, target_modules=["q_proj", "v_proj"])
    own = record(**changes)
    write_adapter(folder, chosen, tensors or pairs(), placement=placed(), base_path="tiny", record=own, fill=fill)
    return folder


def edit(folder, **changes):
    """Change fields of adapter_config.json; None takes one out."""
    path = folder / "adapter_config.json"
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_written_read_and_written_again_is_byte_identical(tmp_path):
    settings = Lora(
        r=4, lora_alpha=32.0, rank_pattern={"q_proj": 4}, alpha_pattern={"v_proj": 3.5}, init_lora_weights="gaussian"
    )
    write(tmp_path / "a", settings=settings, extras={"note": [1, 2.5]}, base_revision="main")
    stored = read_adapter(tmp_path / "a")
    assert stored.record is not None
    write_adapter(
        tmp_path / "b",
        stored.settings,
        stored.tensors,
        placement=placed(stored_targets(stored.config)),
        base_path=stored.config["base_model_name_or_path"],
        record=stored.record,
    )
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert stored.config["lora_alpha"] == 32 and isinstance(stored.config["lora_alpha"], int)


def test_the_tensor_file_depends_on_the_tensors_alone(tmp_path):
    write(tmp_path / "a", base="one")
    write(tmp_path / "b", dict(reversed(pairs().items())), base="another", seed=9)
    name = "adapter_model.safetensors"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_weights_keep_their_dtype(tmp_path, dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in pairs().items()}
    assert same(read_adapter(write(tmp_path / "a", tensors)).tensors, tensors)


def test_an_adapter_is_old_or_new_wherever_its_writer_is_killed(tmp_path):
    folder = tmp_path / "adapter"
    seen = set()
    for _ in killed_everywhere(
        tmp_path, lambda: write(folder, seed=0) and None, lambda: write(folder, pairs(seed=1), seed=1)
    ):
        stored = read_adapter(folder)
        seed = stored.record.seed if stored.record else None
        assert seed is not None and same(stored.tensors, pairs(seed=seed))
        assert list(tmp_path.iterdir()) == [folder]
        seen.add(seed)
    assert seen == {0, 1}


def test_files_that_the_caller_adds_appear_with_the_adapter_or_not_at_all(tmp_path):
    def fill(folder):
        (folder / "README.md").write_text("card")
        raise OSError(28, "No space left on device")

    with pytest.raises(CapacityError):
        write_adapter(
            tmp_path / "a", Lora(r=4), pairs(), placement=placed(), base_path="tiny", record=record(), fill=fill
        )
    assert list(tmp_path.iterdir()) == []


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


OTHERS = [
    ("thesis.txt", False),
    ("config.json", False),
    ("config.json", True),
    ("checkpoint-5/optimizer.pt", True),
    ("notes.txt", True),
    ("training_args.bin", True),
]


@pytest.mark.parametrize(("name", "beside"), OTHERS)
@pytest.mark.parametrize("link", [False, True], ids=["itself", "through a link"])
def test_what_is_no_adapters_is_never_removed_by_saving_one(tmp_path, name, beside, link):
    folder = tmp_path / "mine"
    if beside:
        write(folder)
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("mine")
    before = contents(folder)
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(
        ConfigError, match=f"holds what is no adapter's \\({name.partition('/')[0]}\\), and saving would"
    ):
        write(tmp_path / "link" if link else folder)
    assert contents(folder) == before


def test_what_the_adapter_brought_itself_may_be_replaced_or_go(tmp_path):
    own = {"README.md": "card", "special_tokens_map.json": "{}", "odd_vocabulary.spm": "old"}
    write(tmp_path / "a", fill=lambda folder: [(folder / name).write_text(text) for name, text in own.items()])
    write(tmp_path / "a", fill=lambda folder: (folder / "odd_vocabulary.spm").write_text("new"))
    assert (tmp_path / "a" / "odd_vocabulary.spm").read_text() == "new"
    assert not (tmp_path / "a" / "README.md").exists()
    before = contents(tmp_path / "a")
    with pytest.raises(ConfigError, match=r"holds what is no adapter's \(odd_vocabulary\.spm\)"):
        write(tmp_path / "a")
    assert contents(tmp_path / "a") == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("path", ["", ".", "..", "../.."])
def test_the_folder_one_is_in_is_never_replaced(tmp_path, monkeypatch, path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    with pytest.raises(ConfigError, match="is the folder you are in, or one around it"):
        write(Path(path))
    assert Path.cwd() == tmp_path / "a" / "b"
    assert not list(Path.cwd().iterdir())


@pytest.mark.parametrize("name", ["nul\0", "x" * 250, "x" * 300])
def test_a_path_that_is_none_is_said(tmp_path, name):
    with pytest.raises(ConfigError, match=r"no folder for an adapter|cannot write"):
        write(tmp_path / name)


def test_an_adapter_is_found_in_its_run_folder(tmp_path):
    write(tmp_path / "run" / "adapter")
    assert read_adapter(tmp_path / "run").folder == tmp_path / "run" / "adapter"


def test_a_folder_without_an_adapter_says_what_to_do(tmp_path):
    with pytest.raises(FileFormatError, match="there is no such folder"):
        find_adapter(tmp_path / "none")
    with pytest.raises(FileFormatError, match=r"adapter_config\.json is missing"):
        find_adapter(tmp_path)
    (tmp_path / "config.yaml").touch()
    with pytest.raises(FileFormatError, match=r"has no adapter yet. Finish it: onebase train .* --resume"):
        find_adapter(tmp_path)
    with pytest.raises(FileFormatError, match="is a file"):
        find_adapter(tmp_path / "config.yaml")


REFUSED = {
    "alora_invocation_tokens": [1],
    "lora_bias": True,
    "layer_replication": [[0, 2], [1, 3]],
    "megatron_config": {"a": 1},
    "use_qalora": True,
    "init_lora_weights": "pissa_niter_16",
    "kasa_config": {"beta": 1},
    "arrow_config": {"top_k": 3},
    "use_bdlora": {"nblocks": 2},
    "monteclora_config": {"num_samples": 2},
}


@pytest.mark.parametrize("field", REFUSED)
def test_what_would_change_the_result_is_refused_by_its_name(tmp_path, field):
    edit(write(tmp_path / "a"), **{field: REFUSED[field]})
    with pytest.raises(FileFormatError, match=rf"adapter_config\.json\n  {field}: .*peft"):
        read_adapter(tmp_path / "a")


@pytest.mark.parametrize("start", ["olora", "PiSSA", "corda", "loftq", "lora_ga", "of tomorrow", 3])
def test_a_start_that_may_have_changed_the_base_is_refused(tmp_path, start):
    edit(write(tmp_path / "a"), init_lora_weights=start)
    with pytest.raises(FileFormatError, match="init_lora_weights"):
        read_adapter(tmp_path / "a")


@pytest.mark.parametrize("start", ["eva", "orthogonal", "gaussian", True, False, None])
def test_a_start_on_the_plain_base_is_read(tmp_path, start):
    edit(write(tmp_path / "a"), init_lora_weights=start)
    assert same(read_adapter(tmp_path / "a").tensors, pairs())


def test_every_field_that_peft_knows_is_handled_by_name(tmp_path):
    LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    content = json.loads(path.read_text())
    for name in content:
        path.write_text(json.dumps({**content, name: content[name] or {"odd": "value"}}))
        try:
            _, _, notes = read_config(tmp_path)
        except FileFormatError as error:
            notes = [str(error)]
        assert not [note for note in notes if "not known to onebase" in note], name


def test_a_field_nobody_knows_is_mentioned_when_it_holds_something_and_kept(tmp_path):
    edit(write(tmp_path / "a"), new_thing={"x": 1}, empty_thing=None, off_thing=False)
    stored = read_adapter(tmp_path / "a")
    assert [note for note in stored.notes if "thing" in note] == [
        f"{tmp_path / 'a' / 'adapter_config.json'}: new_thing is not known to onebase and has no effect, got {{'x': 1}}."
    ]
    assert stored.config["new_thing"] == {"x": 1}


def test_all_faults_of_a_config_are_told_at_once(tmp_path):
    edit(write(tmp_path / "a"), r=0, lora_alpha="32", rank_pattern={"q": 1.5}, use_dora="x", use_rslora=1)
    with pytest.raises(FileFormatError, match="5 problems in") as error:
        read_adapter(tmp_path / "a")
    for part in ("r: must be a whole number from 1, got 0", "lora_alpha", "rank_pattern", "use_dora", "use_rslora"):
        assert f"\n  {part}" in str(error.value)


def test_a_config_without_what_it_needs_is_refused(tmp_path):
    edit(write(tmp_path / "a"), r=..., lora_alpha=...)
    with pytest.raises(FileFormatError, match="lora_alpha: is missing"):
        read_adapter(tmp_path / "a")


@pytest.mark.parametrize("kind", ["ADALORA", "unheard of", None, 3, ["LORA"]])
def test_another_method_is_refused_with_those_that_are_read(tmp_path, kind):
    edit(write(tmp_path / "a"), peft_type=kind)
    with pytest.raises(FileFormatError, match=r"peft_type must be one that onebase reads \(LORA, IA3, .*\), got"):
        read_adapter(tmp_path / "a")


DAMAGED = [
    (b"{", "must be JSON"),
    (b"[]", "one JSON object"),
    (b"\xff", "UTF-8"),
    (b"[" * 100_000, "must be JSON that can be read: maximum recursion"),
    (b'{"r": ' + b"9" * 5000 + b"}", "must be JSON that can be read: Exceeds the limit"),
]


@pytest.mark.parametrize(("data", "words"), DAMAGED)
def test_a_config_that_is_no_json_object_is_refused(tmp_path, data, words):
    (write(tmp_path / "a") / "adapter_config.json").write_bytes(data)
    with pytest.raises(FileFormatError, match=words):
        read_adapter(tmp_path / "a")


def test_a_folder_in_the_place_of_the_record_is_named(tmp_path):
    (write(tmp_path / "a") / "onebase.json").unlink()
    (tmp_path / "a" / "onebase.json").mkdir()
    with pytest.raises(FileFormatError, match=r"onebase\.json: cannot be read \(Is a directory\)"):
        read_adapter(tmp_path / "a")


def test_a_missing_tensor_file_is_named(tmp_path):
    (write(tmp_path / "a") / "adapter_model.safetensors").unlink()
    with pytest.raises(FileFormatError, match=r"adapter_model\.safetensors: the file is missing"):
        read_adapter(tmp_path / "a")


def test_a_damaged_tensor_file_is_named(tmp_path):
    path = write(tmp_path / "a") / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(FileFormatError, match=r"adapter_model\.safetensors: damaged"):
        read_adapter(tmp_path / "a")


def test_a_pickle_is_refused_with_a_line_that_converts_it(tmp_path):
    folder = write(tmp_path / "a b")
    (folder / "adapter_model.safetensors").unlink()
    torch.save({f"base_model.model.{name}": tensor for name, tensor in pairs().items()}, folder / "adapter_model.bin")
    with pytest.raises(FileFormatError, match="a pickle, which can run code") as error:
        read_adapter(folder)
    command = str(error.value).splitlines()[-1].strip()
    subprocess.run([sys.executable, *shlex.split(command)[1:]], check=True)
    assert same(read_adapter(folder).tensors, pairs())


def put_tensors(folder, tensors):
    save_file({f"base_model.model.{name}": tensor for name, tensor in tensors.items()}, folder / tensor_name)


tensor_name = "adapter_model.safetensors"


def test_keys_with_an_adapters_name_or_without_pefts_prefix_are_read(tmp_path):
    folder = write(tmp_path / "a")
    save_file({name.replace(".weight", ".default.weight"): one for name, one in pairs().items()}, folder / tensor_name)
    assert same(read_adapter(folder).tensors, pairs())


def test_keys_of_two_adapters_are_refused(tmp_path):
    folder = write(tmp_path / "a")
    left, right = pairs(PATHS[:1]), pairs(PATHS[1:2])
    named = {
        name.replace(".weight", f".{who}.weight"): one
        for who, some in (("x", left), ("y", right))
        for name, one in some.items()
    }
    put_tensors(folder, named)
    with pytest.raises(FileFormatError, match=r"more than one adapter: \['x', 'y'\]"):
        read_adapter(folder)


DAMAGE = {
    "half a pair": (lambda t: t.pop(f"{PATHS[0]}.lora_B.weight"), f"{PATHS[0]}: lora_B is missing beside lora_A"),
    "another rank": (lambda t: t.update(pairs(PATHS[1:2], r=5)), rf"{PATHS[1]}: lora_A must be \(4, in\)"),
    "a NaN": (lambda t: t[f"{PATHS[0]}.lora_A.weight"].view(-1)[3].fill_(math.nan), "1 of 32 values are NaN"),
    "an infinity": (lambda t: t[f"{PATHS[0]}.lora_B.weight"].fill_(math.inf), "24 of 24 values are NaN or infinite"),
    "whole numbers": (lambda t: t.update({k: v.int() for k, v in t.items()}), "must be float32"),
    "a convolution": (lambda t: t.update({f"{PATHS[0]}.lora_A.weight": torch.zeros(4, 8, 1, 1)}), "2 dimensions"),
    "nothing": (lambda t: t.clear(), "would change nothing"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_tensors_that_are_no_pairs_of_finite_weights_are_neither_read_nor_written(tmp_path, damage):
    spoil, words = DAMAGE[damage]
    tensors = pairs()
    spoil(tensors)
    folder = write(tmp_path / "a")
    put_tensors(folder, tensors)
    with pytest.raises(FileFormatError, match=words):
        read_adapter(folder)
    if tensors:
        with pytest.raises(FileFormatError, match=words):
            write(tmp_path / "b", tensors)
        assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("model.embed_tokens.lora_embedding_A", "lora_B is missing beside lora_A"),
        (f"{PATHS[0]}.lora_magnitude_vector", "DoRA's magnitudes, but use_dora is None"),
        (f"{PATHS[0]}.lora_B.bias", "no tensor of LoRA as LORA has them"),
        (f"{PATHS[0]}.base_layer.bias", "a trained bias, but bias is None"),
        (f"{PATHS[0]}.bias", "no tensor of LoRA"),
        (f"{PATHS[0]}.ia3_l", "no tensor of LoRA"),
        ("prompt_embeddings", "no tensor of LoRA"),
        ("wte.token_adapter.trainable_tokens_delta", "rows of an embedding, but trainable_token_indices is None"),
    ],
)
def test_tensors_beside_the_pairs_that_the_config_does_not_speak_of_are_refused_by_name(tmp_path, key, words):
    folder = write(tmp_path / "a")
    edit(folder, use_dora=..., bias=..., trainable_token_indices=...)
    put_tensors(folder, {**pairs(), key: torch.ones(2, 2)})
    with pytest.raises(FileFormatError, match=words) as error:
        read_adapter(folder)
    assert key.split(".lora_embedding")[0] in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_dora": True}, "lora_magnitude_vector is missing"),
        ({"trainable_token_indices": [1]}, "trainable_tokens_delta is missing"),
        ({"modules_to_save": ["score"]}, r"no tensor of modules_to_save, \['score'\]"),
    ],
)
def test_what_the_config_speaks_of_and_the_file_has_not_is_told(tmp_path, changes, words):
    edit(write(tmp_path / "a"), **changes)
    with pytest.raises(FileFormatError, match=words):
        read_adapter(tmp_path / "a")


@pytest.mark.parametrize("key", ["model.embed_tokens.weight", "lm_head.base_layer.weight", "model.norm.weight"])
def test_weights_of_the_base_beside_an_adapter_are_kept_apart_to_be_compared(tmp_path, key):
    folder = write(tmp_path / "a")
    put_tensors(folder, {**pairs(), key: torch.ones(2, 2)})
    stored = read_adapter(folder)
    assert same(stored.tensors, pairs())
    assert same(stored.base_copies, {key.replace(".base_layer", ""): torch.ones(2, 2)})


def test_modules_to_save_are_found_by_the_bare_end_of_their_path_as_peft_does(tmp_path):
    folder = write(tmp_path / "a")
    edit(folder, modules_to_save=["norm", "score"])
    heads = {"model.layers.0.input_layernorm.weight": torch.ones(3), "score.dense.bias": torch.ones(2)}
    put_tensors(folder, {**pairs(), **heads})
    stored = read_adapter(folder)
    assert isinstance(stored.settings, Lora)
    assert stored.settings.modules_to_save == ["model.layers.0.input_layernorm", "score"]
    assert same(stored.tensors, dict(sorted({**pairs(), **heads}.items())))


def test_a_full_disk_while_tensors_are_written_leaves_the_old_adapter(tmp_path, monkeypatch):
    write(tmp_path / "a")

    def full(path, data):
        path.write_bytes(data[:50])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensor_file, "write_synced", full)
    with pytest.raises(CapacityError, match="still complete"):
        write(tmp_path / "a", pairs(seed=1))
    assert same(read_adapter(tmp_path / "a").tensors, pairs())
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
