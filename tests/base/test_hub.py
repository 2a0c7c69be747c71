"""The hub is asked briefly, refused early and remembered: tried against a small hub of our own."""

import http.server
import json
import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import huggingface_hub
import pytest

from onebase.base import hub, packages, pretrained
from onebase.errors import FileFormatError, ModelError
from tests.base import tiny

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """The three questions of the hub's protocol that a download asks, answered from folders."""

    models: dict[str, Path]
    asked: list[str]

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.asked.append(f"{self.command} {self.path}")
        parts = self.path.split("?")[0].strip("/").split("/")
        at_api = parts[:2] == ["api", "models"]
        name = "/".join(parts[2:4] if at_api else parts[:2])
        folder = self.models.get(name)
        if folder is None:
            return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if "no-such-branch" in parts:
            return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        if at_api and "tree" in parts:
            listed = [{"type": "file", "path": p, "size": f.stat().st_size, "oid": etag(f)} for p, f in files.items()]
            return self.answer(200, json.dumps(listed).encode(), {})
        if at_api:
            siblings = [{"rfilename": p, "size": f.stat().st_size} for p, f in files.items()]
            body = {"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings}
            return self.answer(200, json.dumps(body).encode(), {})
        content = files["/".join(parts[4:])].read_bytes()
        return self.answer(200, content, {"ETag": f'"{etag(files["/".join(parts[4:])])}"', "X-Repo-Commit": COMMIT})

    def answer(self, status, body, headers):
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


def etag(path):
    import hashlib

    return hashlib.sha1(path.read_bytes()).hexdigest()


@pytest.fixture
def small_hub(monkeypatch, tmp_path):
    """A hub that has `org/tiny`, and onebase pointed at it, with an empty cache."""
    handler = type("Handler", (Hub,), {"models": {"org/tiny": tiny.llama_folder(tmp_path / "tiny")}, "asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.chdir(tmp_path)
    yield handler
    server.shutdown()


def shut(monkeypatch):
    """Point at a port where nobody listens."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")


def test_a_model_of_the_hub_is_downloaded_opened_and_kept_for_offline_days(small_hub, monkeypatch):
    said: list[str] = []
    found = pretrained.locate("org/tiny", say=said.append)
    assert (found.kind, found.revision) == ("hub", COMMIT)
    assert "fetching org/tiny" in said[0]
    model, tokenizer, _ = pretrained.open_pretrained(found)
    assert tokenizer.convert_tokens_to_ids("one") == 3
    assert model.config.num_hidden_layers == 2
    assert pretrained.locate("org/tiny", offline=True, say=said.append) == found
    assert len(said) == 1
    shut(monkeypatch)
    assert pretrained.locate("org/tiny", say=said.append) == found
    assert "did not answer" in said[1]
    assert "using the copy in its cache" in said[1]


def test_only_what_is_needed_is_downloaded(small_hub, tmp_path):
    for name in (
        "pytorch_model.bin",
        "consolidated.safetensors",
        "picture.png",
        "onnx/model.onnx",
        "original/x.safetensors",
    ):
        (small_hub.models["org/tiny"] / name).parent.mkdir(exist_ok=True)
        (small_hub.models["org/tiny"] / name).write_bytes(b"x")
    folder = pretrained.locate("org/tiny", say=tiny.hush).folder
    kept = {path.name for path in folder.rglob("*") if not path.is_dir()}
    assert kept == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"pytorch_model.bin": b"x", "config.json": b"{}"}, "pickle"),
        ({"q4.gguf": b"GGUF"}, "hf download org/other q4.gguf"),
        ({"README.md": b"x"}, "no safetensors weights"),
    ],
)
def test_a_model_without_safetensors_is_refused_before_anything_is_downloaded(small_hub, tmp_path, files, said):
    (tmp_path / "other").mkdir()
    for name, content in files.items():
        (tmp_path / "other" / name).write_bytes(content)
    small_hub.models["org/other"] = tmp_path / "other"
    with pytest.raises(ModelError, match=said):
        pretrained.locate("org/other", say=tiny.hush)
    assert not [line for line in small_hub.asked if "resolve" in line]


def test_a_model_or_revision_that_the_hub_lacks_is_an_error_that_names_it(small_hub):
    with pytest.raises(ModelError, match="the hub has no such model"):
        pretrained.locate("org/nothing", say=tiny.hush)
    with pytest.raises(ModelError, match="no revision 'no-such-branch'"):
        pretrained.locate("org/tiny", revision="no-such-branch", say=tiny.hush)


def test_a_name_that_cannot_be_a_hub_id_is_an_error_not_a_question(small_hub):
    with pytest.raises(ModelError, match="cannot be a hub id"):
        pretrained.locate("white space/x", say=tiny.hush)
    assert small_hub.asked == []


def test_a_damaged_copy_in_the_cache_is_an_error_that_names_the_file(small_hub):
    weights = pretrained.locate("org/tiny", say=tiny.hush).folder / "model.safetensors"
    weights.resolve().write_bytes(b"damaged")
    with pytest.raises(FileFormatError, match=r"model\.safetensors"):
        pretrained.locate("org/tiny", offline=True, say=tiny.hush)


def test_models_at_hand_are_the_packaged_ones_and_those_in_the_hubs_cache(small_hub, monkeypatch, tmp_path):
    monkeypatch.setenv("ONEBASE_HOME", str(tmp_path / "home"))
    assert [(model.name, model.at_hand) for model in hub.list_models()] == [(name, False) for name in packages.PACKAGES]
    place = pretrained.locate("org/tiny", say=tiny.hush)
    listed = {model.name: model for model in hub.list_models()}
    assert listed["org/tiny"].folder == place.folder
    assert listed["org/tiny"].size_bytes > 0
    assert all(listed[name].licence == "Apache-2.0" for name in packages.PACKAGES)


def test_a_hub_that_never_answers_is_given_up_on_soon(small_hub, monkeypatch):
    monkeypatch.setattr(hub, "DEADLINE_S", 0.5)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: time.sleep(60))
    started = time.monotonic()
    with pytest.raises(ModelError, match="no answer in"):
        pretrained.locate("org/tiny", say=tiny.hush)
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(("offline", "said"), [("0", "the hub did not answer"), ("1", "the hub was not asked")])
def test_without_a_network_the_answer_comes_within_ten_seconds_and_names_every_place(tmp_path, offline, said):
    script = """
        import time
        from onebase.base import pretrained
        from onebase.errors import ModelError
        started = time.monotonic()
        try:
            pretrained.locate("org/smollm2-135m-instruct")
        except ModelError as error:
            print(error)
        print(f"SECONDS {time.monotonic() - started}")
    """
    quiet = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": offline, "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**os.environ, **quiet}, capture_output=True, text=True, check=True, cwd=tmp_path,
    )  # fmt: skip
    assert float(done.stdout.rsplit("SECONDS ", 1)[1]) < 10
    for part in (
        said,
        str(tmp_path / "hub"),
        "closest is 'smollm2-135m-instruct'",
        str(tmp_path / "org"),
    ):
        assert part in done.stdout
    assert done.stderr == ""
