"""Models by hub id, against a hub on localhost that counts requests, and against prepared caches."""

import gzip
import hashlib
import json
import threading
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from huggingface_hub import constants, utils
from safetensors.torch import load_file, save_file

import minsd
from minsd.weights import hub

SHA = "a" * 40
REPO = "someone/small"


class Hub(ThreadingHTTPServer):
    """repos: id -> {file name: path}; closed: id -> HTTP status of its files; broken: names of files that
    cannot be fetched; sent: names of the files fetched so far; commits: revision -> its commit."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos, self.closed, self.broken, self.sent, self.requests = {}, {}, set(), [], 0
        self.commits = {"main": SHA, hub.CLIP_REVISION: hub.CLIP_REVISION}
        self.url = f"http://127.0.0.1:{self.server_port}"

    def commit(self, revision):
        return (self.commits | {commit: commit for commit in self.commits.values()}).get(revision)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status=200, body=b"", **headers):
        self.send_response(status)
        for name, value in ({"Content-Length": len(body)} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        server, path = self.server, self.path.partition("?")[0].strip("/")
        server.requests += 1
        if path.startswith("api/models/"):
            parts = path.split("/")
            repo = "/".join(parts[2:4])
            if repo not in server.repos:
                return self.answer(401, b"{}", X_Error_Code="RepoNotFound")
            commit = server.commit(parts[5] if len(parts) > 5 else "main")
            if commit is None:
                return self.answer(404, b"{}", X_Error_Code="RevisionNotFound")
            files = sorted(server.repos[repo])
            if "tree" in parts:
                body = [
                    {
                        "type": "file",
                        "path": name,
                        "size": server.repos[repo][name].stat().st_size,
                        "oid": "0" * 40,
                    }
                    for name in files
                ]
            else:
                body = {
                    "id": repo,
                    "sha": commit,
                    "siblings": [{"rfilename": name} for name in files],
                    "private": False,
                }
            return self.answer(200, json.dumps(body).encode(), Content_Type="application/json")
        repo, _, rest = path.partition("/resolve/")
        revision, _, name = rest.partition("/")
        if repo in server.closed:
            return self.answer(
                server.closed[repo], b"", X_Error_Code="GatedRepo" if server.closed[repo] == 403 else ""
            )
        if name not in server.repos.get(repo, {}):
            return self.answer(
                404, b"", X_Error_Code="EntryNotFound" if repo in server.repos else "RepoNotFound"
            )
        if name in server.broken:
            return self.answer(451)
        body = server.repos[repo][name].read_bytes()
        if self.command == "GET":
            server.sent.append(name)
        return self.answer(
            200, body, ETag=f'"{hashlib.sha256(body).hexdigest()}"', X_Repo_Commit=server.commit(revision)
        )

    do_HEAD = do_GET


@pytest.fixture
def server(monkeypatch, tmp_path):
    with Hub() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        template = "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + template)
        monkeypatch.setattr(
            "huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE", server.url + template, raising=False
        )  # before 1.0
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(
            "huggingface_hub.utils.are_progress_bars_disabled", lambda *a: True, raising=False
        )
        monkeypatch.chdir(tmp_path)
        yield server
        server.shutdown()


@pytest.fixture
def offline(monkeypatch):
    def go(on=True):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", on)
        getattr(utils, "reset_sessions", lambda: None)()  # before 1.0 they were made on- or offline

    yield go
    go(False)


@pytest.fixture(scope="module")
def repo(small_folder, tmp_path_factory):
    """Like real repositories: every network in two precisions, pickles, single files, unneeded files."""
    where = tmp_path_factory.mktemp("repo")
    files = {
        path.relative_to(small_folder).as_posix(): path for path in small_folder.rglob("*") if path.is_file()
    }
    for name in [n for n in files if n.endswith(".safetensors")]:
        half = where / name.replace("/", "-")
        save_file({k: v.half() for k, v in load_file(files[name]).items()}, half)
        files[name.replace(".safetensors", ".fp16.safetensors")] = half
        files[name.replace(".safetensors", ".bin")] = half
        files[name.replace(".safetensors", ".non_ema.safetensors")] = half
    (where / "junk").write_text("junk")
    for name in (
        "v1-5-pruned.safetensors",
        "v1-5-pruned.ckpt",
        "README.md",
        ".gitattributes",
        "safety_checker/model.safetensors",
        "safety_checker/config.json",
        "feature_extractor/preprocessor_config.json",
        "unet/diffusion_flax_model.msgpack",
    ):
        files[name] = where / "junk"
    return files


def refused(model, **more):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        minsd.load(model, "cpu", **more)
    message = str(error.value)
    assert "\n" not in message
    return message


def weights(server):
    return sorted(name for name in server.sent if not name.endswith((".json", ".txt")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_only_what_is_needed_is_fetched_and_only_once(server, repo, small, offline, dtype):
    server.repos[REPO] = repo
    sd = minsd.load(REPO, "cpu", dtype)
    variant = "" if dtype == torch.float32 else ".fp16"
    assert weights(server) == [
        f"text_encoder/model{variant}.safetensors",
        f"unet/diffusion_pytorch_model{variant}.safetensors",
        f"vae/diffusion_pytorch_model{variant}.safetensors",
    ]
    assert not [
        name
        for name in server.sent
        if name.startswith(("safety_checker", "feature_extractor")) or name == "README.md"
    ]
    assert len(server.sent) == len(set(server.sent))
    assert all(
        torch.equal(a, b.to(dtype))
        for a, b in zip(sd.unet.state_dict().values(), small.unet.state_dict().values())
    )
    assert sd.name == "small"
    asked = server.requests
    minsd.load(REPO, "cpu", dtype)
    assert server.requests == asked  # a model that is whole in the cache needs no network
    offline()
    minsd.load(REPO, "cpu", dtype)


def test_a_revision_is_taken_and_recorded(server, repo, offline):
    server.repos[REPO] = repo
    server.commits["v2"] = "c" * 40
    sd = minsd.load(f"{REPO}@v2", "cpu")
    assert sd.model_revision == "c" * 40 and sd.name == "small"
    assert minsd.load(REPO, "cpu").model_revision == SHA
    assert "has no revision v3: give a branch" in refused(f"{REPO}@v3")
    offline()
    assert minsd.load(f"{REPO}@v2", "cpu").model_revision == "c" * 40
    assert minsd.load(f"{REPO}@{'c' * 40}", "cpu").model_revision == "c" * 40


def test_the_other_precision_serves_where_there_is_no_network(server, repo, offline):
    server.repos[REPO] = repo
    minsd.load(REPO, "cpu", torch.float16)
    offline()
    minsd.load(REPO, "cpu", torch.float32)
    offline(False)
    minsd.load(REPO, "cpu", torch.float32)
    assert len(weights(server)) == 6


def test_shards_are_fetched_by_their_index(server, repo, small, tmp_path):
    whole = load_file(repo["unet/diffusion_pytorch_model.safetensors"])
    names = sorted(whole)
    files = {k: v for k, v in repo.items() if not k.startswith("unet/diffusion_pytorch_model")}
    shards = {f"diffusion_pytorch_model-0000{i}-of-00002.safetensors": names[i - 1 :: 2] for i in (1, 2)}
    for file, part in shards.items():
        save_file({name: whole[name] for name in part}, tmp_path / file)
        files[f"unet/{file}"] = tmp_path / file
    index = tmp_path / "index.json"
    shard_of = {name: file for file, part in shards.items() for name in part}
    index.write_text(json.dumps({"weight_map": shard_of}))
    files["unet/diffusion_pytorch_model.safetensors.index.json"] = index
    server.repos[REPO] = files
    sd = minsd.load(REPO, "cpu")
    assert all(
        torch.equal(a, b) for a, b in zip(sd.unet.state_dict().values(), small.unet.state_dict().values())
    )
    assert sum("-of-00002" in name for name in server.sent) == 2


def test_an_interrupted_download_goes_on(server, repo):
    server.repos[REPO] = repo
    server.broken.add("vae/diffusion_pytorch_model.safetensors")
    assert REPO in refused(REPO)
    assert len(weights(server)) == 2
    server.broken.clear()
    minsd.load(REPO, "cpu")
    assert len(weights(server)) == 3 and len(server.sent) == len(set(server.sent))


def test_pickles_alone_are_refused(server, repo):
    server.repos[REPO] = {
        name: path
        for name, path in repo.items()
        if not name.startswith("vae/") or not name.endswith(".safetensors")
    }
    assert "pickles can run code" in refused(REPO)
    assert weights(server) == []


def test_other_kinds_are_refused_before_anything_large_is_fetched(server, repo, tmp_path):
    index = tmp_path / "index.json"
    index.write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    server.repos[REPO] = repo | {"model_index.json": index}
    assert "StableDiffusionXLPipeline" in refused(REPO)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(repo["unet/config.json"].read_text()) | {"in_channels": 9}))
    server.repos["someone/paint"] = repo | {"unet/config.json": config}
    assert "inpainting" in refused("someone/paint")
    server.repos["someone/single"] = {"model.safetensors": repo["README.md"], "README.md": repo["README.md"]}
    assert "download its model.safetensors" in refused("someone/single")
    assert weights(server) == []


def test_closed_and_missing_repositories(server, repo, offline):
    assert "no model someone/nothing" in refused("someone/nothing")
    server.repos[REPO], server.closed[REPO] = repo, 403
    assert "terms" in refused(REPO)
    server.closed[REPO] = 451
    assert "someone/small" in refused(REPO)
    offline()
    assert "offline" in refused(REPO) and "offline" in refused("someone/nothing")


@pytest.mark.parametrize("old", [*hub.MOVED])
def test_ids_that_vanished_say_where_they_went(server, offline, old):
    assert f"now {hub.MOVED[old]}" in refused(old)
    offline()
    assert f"now {hub.MOVED[old]}" in refused(old)


def test_a_vanished_id_in_the_cache_still_works(server, repo, offline):
    server.repos["runwayml/stable-diffusion-v1-5"] = repo
    minsd.load("runwayml/stable-diffusion-v1-5", "cpu")
    del server.repos["runwayml/stable-diffusion-v1-5"]
    minsd.load("runwayml/stable-diffusion-v1-5", "cpu")


def test_family_names_are_hub_ids(server):
    for name, row in minsd.config.MODELS.items():
        if row.hub_id:
            assert row.hub_id in refused(name)


def test_no_network(server, monkeypatch):
    server.shutdown()
    server.server_close()
    message = refused(REPO)
    assert "cannot be reached" in message and "give a folder" in message


def test_the_tokenizer_of_an_installed_open_clip(tmp_path, monkeypatch, shapes_folder):
    """Its file of merges, cut to CLIP's number: the tokens of the two are numbered alike."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda name: None)
    assert hub._open_clip_tokenizer() is None
    merges = ["#version", *(f"{c}{d} x{k}" for k in range(100) for c in "abcdefghij" for d in "klmnopqrst")]
    (tmp_path / "bpe_simple_vocab_16e6.txt.gz").write_bytes(gzip.compress("\n".join(merges).encode()))
    package = types.SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda name: package)
    folder = hub._open_clip_tokenizer()
    vocab = json.loads((folder / "vocab.json").read_text())
    # The first and last tokens of single bytes, and the first merge, have the numbers they have in CLIP.
    assert (vocab["!"], vocab["a"], vocab["a</w>"], vocab["akx0"]) == (0, 64, 320, 512)
    assert vocab["<|endoftext|>"] == len(vocab) - 1
    assert (folder / "merges.txt").read_text().splitlines()[1:] == merges[1:]


def test_the_tokenizer_of_single_files(server, offline, shapes_folder, monkeypatch):
    """From any model in the cache, or fetched; otherwise an error that says what to do."""
    monkeypatch.setattr(hub, "_open_clip_tokenizer", lambda: None)
    offline()
    with pytest.raises(FileNotFoundError, match="--tokenizer DIR"):
        hub.tokenizer()
    offline(False)
    with pytest.raises(FileNotFoundError, match="--tokenizer DIR"):
        hub.tokenizer()
    files = {path.name: path for path in (shapes_folder / "tokenizer").iterdir()}
    server.repos[hub.CLIP] = files | {"model.safetensors": files["vocab.json"]}
    folder = hub.tokenizer()
    assert sorted(server.sent) == sorted(hub.TOKENIZER_FILES)
    offline()
    assert hub.tokenizer() == folder
    assert all((folder / name).read_bytes() == files[name].read_bytes() for name in hub.TOKENIZER_FILES)


def test_the_tokenizer_out_of_a_cached_model(server, repo, offline, shapes_folder):
    files = repo | {
        f"tokenizer/{name}": shapes_folder / "tokenizer" / name for name in ("vocab.json", "merges.txt")
    }
    server.repos["CompVis/stable-diffusion-v1-4"] = files
    minsd.load("sd14", "cpu")
    offline()
    assert (hub.tokenizer() / "vocab.json").read_bytes() == (
        shapes_folder / "tokenizer" / "vocab.json"
    ).read_bytes()


def test_sdxl_has_two_text_encoders(server, sdxl_folder, sdxl, offline, tmp_path):
    """Both encoders and both tokenizers are fetched, and the parts that are not read are left."""
    files = {path.relative_to(sdxl_folder).as_posix(): path for path in sdxl_folder.rglob("*")}
    files = {name: path for name, path in files.items() if path.is_file()}
    junk = tmp_path / "junk"
    junk.write_text("junk")
    for name in ("sd_xl_base_1.0.safetensors", "text_encoder_2/openvino_model.bin", "vae_1_0/config.json"):
        files[name] = junk
    server.repos["someone/tiny-xl"] = files
    sd = minsd.load("someone/tiny-xl", "cpu")
    assert weights(server) == [
        "text_encoder/model.safetensors",
        "text_encoder_2/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    assert not {"vae_1_0/config.json"} & set(server.sent)
    assert torch.equal(sd.encode_prompt("a star"), sdxl.encode_prompt("a star"))
    offline()
    minsd.load("someone/tiny-xl", "cpu")
    server.repos["someone/half"] = {n: p for n, p in files.items() if n != "text_encoder_2/model.safetensors"}
    offline(False)
    assert "text_encoder_2" in refused("someone/half")
