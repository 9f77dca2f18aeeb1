"""Images and locks: what is pinned, what is built, and the whole chain with every rule in its image."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from conftest import ROOT, Workspace

from longyarn.cluster import container_images
from longyarn.core.errors import UserError

SPEC = importlib.util.spec_from_file_location("lock", ROOT / "envs" / "lock.py")
lock = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(lock)

ENVS, RECIPES = ROOT / "envs", ROOT / "containers"
IN_APPTAINER = "--software-deployment-method=apptainer"


def pins(name: str) -> dict[tuple[str, str], tuple[str, list[str]]]:
    """Return {(package, marker): (version, hashes)} of a lock."""
    text = (ENVS / f"{name}.txt").read_text(encoding="utf-8").replace("\\\n", " ")
    found = {}
    for line in text.splitlines():
        if line and not line.lstrip().startswith("#"):
            requirement, *hashes = line.split(" --hash=sha256:")
            pin, _, marker = requirement.partition(";")
            package, _, version = pin.strip().partition("==")
            found[package, marker.strip()] = (version, [text.strip() for text in hashes])
    return found


# Locks.


@pytest.mark.parametrize("name", lock.LOCKS)
def test_every_package_of_a_lock_has_a_version_and_hashes(name):
    assert pins(name)
    for version, hashes in pins(name).values():
        assert version
        assert hashes
        assert all(re.fullmatch(r"[0-9a-f]{64}", digest) for digest in hashes)


@pytest.mark.parametrize("name", lock.LOCKS)
def test_a_lock_is_of_its_in_file(name):
    """An .in file that was edited, and not locked with `make lock`, fails here."""
    text = (ENVS / f"{name}.txt").read_text(encoding="utf-8")
    assert text.startswith(lock.header(name)), f"envs/{name}.in was edited: run `make lock`"
    locked = {package: version for (package, _), (version, _) in pins(name).items()}
    for line in (ENVS / f"{name}.in").read_text(encoding="utf-8").splitlines():
        wanted = re.match(r"([a-z][\w.-]*)(?:==([\w.+]+))?", line)
        if wanted:
            package, version = wanted.groups()
            assert version in (None, locked[package])


def test_an_edited_in_file_would_be_noticed(tmp_path, monkeypatch):
    before = lock.header("run")
    shutil.copytree(ENVS, tmp_path / "envs")
    monkeypatch.setattr(lock, "HERE", tmp_path / "envs")
    assert lock.header("run") == before
    (tmp_path / "envs" / "run.in").write_text("torch\n")
    assert lock.header("run") != before


def test_locks_agree_on_the_packages_they_share():
    """CPU and CUDA, runs and development: one version each; of torch, builds of one version."""
    versions = {}
    for name in lock.LOCKS:
        for (package, marker), (version, _) in pins(name).items():
            version = version.partition("+")[0]
            assert versions.setdefault((package, marker), version) == version, (name, package)
    torch = (ENVS / "torch.txt").read_text(encoding="utf-8").splitlines()[-1]
    assert versions["torch", ""] == torch.partition("==")[2]


def test_the_cuda_lock_is_what_the_index_has_for_linux(tmp_path):
    """It resolves for Python 3.11 and 3.12 on x86-64, and its hashes are the index's (no download)."""
    for name in ("cuda", "flash"):
        if name == "cuda":
            for python in ("3.11", "3.12"):
                command = ["uv", "pip", "install", "--no-config", "--dry-run", "--require-hashes"]
                command += ["--no-deps", "--only-binary", ":all:", "--target", tmp_path]
                command += ["--python-platform", "x86_64-manylinux_2_28"]
                run([*command, "--python-version", python, "-r", ENVS / "cuda.txt"])
        command = ["uv", "pip", "compile", "--no-config", "--no-deps", "--universal", "--quiet"]
        command += ["--generate-hashes", "--no-header", "--no-annotate", "--python-version", "3.11"]
        indexed = set(re.findall(r"sha256:(\w+)", run([*command, ENVS / f"{name}.txt"])))
        locked = {digest for _, hashes in pins(name).values() for digest in hashes}
        assert locked <= indexed


def run(command: list) -> str:
    """Run a command and return what it printed; a failure fails the test."""
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    }
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    return done.stdout


# Recipes.


@pytest.mark.parametrize("image", container_images.LOCKS)
def test_dockerfile_and_definition_are_of_one_base_and_of_the_same_files(image):
    dockerfile = (RECIPES / f"{image}.Dockerfile").read_text(encoding="utf-8")
    definition = (RECIPES / f"{image}.def").read_text(encoding="utf-8")
    (base,) = re.findall(r"^ARG BASE=docker.io/(\S+)$", dockerfile, re.M)
    (from_,) = re.findall(r"^From: (\S+)$", definition, re.M)
    assert base.removeprefix("library/") == from_
    assert re.search(r"@sha256:[0-9a-f]{64}$", base)
    wanted = {"containers/install", *(f"envs/{name}.txt" for name in container_images.LOCKS[image])}
    assert set(re.findall(r"(?:containers|envs)/\w+(?:\.txt)?(?= )", dockerfile)) == wanted
    assert set(re.findall(r"^    ((?:containers|envs)/\S+) ", definition, re.M)) == wanted


def test_the_cuda_base_is_of_the_cuda_that_torch_was_built_for():
    (runtime,) = {v for (p, _), (v, _) in pins("cuda").items() if p == "nvidia-cuda-runtime"}
    comment = (RECIPES / "cuda.Dockerfile").read_text(encoding="utf-8")
    assert f"nvidia/cuda:{'.'.join(runtime.split('.')[:2])}." in comment


@pytest.mark.parametrize("image", container_images.LOCKS)
def test_hadolint_finds_nothing(image):
    hadolint = Path(sys.executable).parent / "hadolint"
    if not hadolint.exists():
        pytest.skip("hadolint is not installed; `make setup-dev` does it on Linux, x86-64")
    assert run([hadolint, RECIPES / f"{image}.Dockerfile"]) == ""


def test_an_image_that_cannot_be_pushed_or_built_is_one_sentence(tmp_path):
    (tmp_path / "bash").symlink_to("/bin/bash")  # a machine with a shell, and without image tools
    for arguments, sentence in {
        ("push", "--image", "cpu"): "no registry to push to",
        ("sif", "--image", "cpu"): "apptainer is not on the path",
    }.items():
        done = subprocess.run(
            [sys.executable, RECIPES / "build.py", *arguments],
            capture_output=True, text=True, env=os.environ | {"PATH": str(tmp_path)},
        )  # fmt: skip
        assert done.returncode == 1
        assert done.stderr.startswith("error: "), done.stderr
        assert sentence in done.stderr
        assert "Traceback" not in done.stderr


# Which image a run takes.


@pytest.fixture
def tree(tmp_path) -> Path:
    """A copy of what recipes are made of."""
    for part in ("containers", "envs"):
        shutil.copytree(ROOT / part, tmp_path / part)
    (tmp_path / "containers" / "images.yaml").write_text("cpu: null\ncuda: null\n")
    return tmp_path


def config_of(image: str, **paths) -> dict:
    """Return the part of a config that images depend on."""
    paths = {"results": "results", "work": "work", "cache": ".cache"} | paths
    return {"container": {"image": image}, "paths": paths, "model": {"source": "owner/name"}} | {
        "training": {"source": None}
    }


def test_an_image_of_ours_is_the_recorded_digest_or_the_sif_of_this_tree(tree):
    recipe = container_images.recipe("cpu", "def", tree)
    assert (
        container_images.resolve(config_of("cpu"), tree)
        == f".cache/images/longyarn-cpu-{recipe}.sif"
    )
    address = f"docker://registry.example.org/longyarn-cpu@sha256:{'0' * 64}"
    entry = {"image": address, "recipe": container_images.recipe("cpu", "Dockerfile", tree)}
    (tree / "containers" / "images.yaml").write_text(yaml.safe_dump({"cpu": entry, "cuda": None}))
    assert container_images.resolve(config_of("cpu"), tree) == address
    assert container_images.missing(config_of("cpu"), tree) is None
    assert "-cuda-" in container_images.resolve(config_of("cuda"), tree)


@pytest.mark.parametrize("changed", ["envs/run.txt", "envs/cpu.txt", "containers/install"])
def test_another_lock_is_another_image_and_a_recorded_one_is_no_longer_taken(tree, changed):
    entry = {
        "image": "docker://a@sha256:0",
        "recipe": container_images.recipe("cpu", "Dockerfile", tree),
    }
    (tree / "containers" / "images.yaml").write_text(yaml.safe_dump({"cpu": entry, "cuda": None}))
    before = container_images.recipe("cpu", "def", tree)
    (tree / changed).write_text((tree / changed).read_text() + "# changed\n")
    after = container_images.recipe("cpu", "def", tree)
    assert after != before
    assert container_images.resolve(config_of("cpu"), tree).endswith(f"-{after}.sif")
    assert "run `make sif IMAGE=cpu`" in container_images.missing(config_of("cpu"), tree)


def test_an_image_of_the_users_is_taken_as_it_is(tree):
    address = f"docker://registry.example.org/mine@sha256:{'1' * 64}"
    assert container_images.resolve(config_of(address), tree) == address
    assert container_images.missing(config_of(address), tree) is None
    assert container_images.resolve(config_of("mine.sif"), tree) == "mine.sif"
    assert container_images.missing(config_of("mine.sif"), tree) == (
        "container.image mine.sif is missing; build it or fix the path"
    )


def test_an_image_is_entered_as_snakemake_does_it():
    from snakemake.deployment import singularity
    from snakemake.deployment.singularity import Image

    persistence = SimpleNamespace(container_img_path=".snakemake/singularity")
    dag = SimpleNamespace(workflow=SimpleNamespace(persistence=persistence))
    for image in (f"docker://a/b@sha256:{'2' * 64}", ".cache/images/x.sif"):
        file = Image(image, dag, False).path
        assert container_images.image_file(image) == file
        command = singularity.shellcmd(file, "true", args="--nv", shell_executable="bash")
        said = container_images.exec_command(image, "--nv").replace('"$PWD"', repr(os.getcwd()))
        assert command.split()[1:] == [*said.split()[1:], "bash", "-c", "'true'"]


def test_the_environment_binds_and_keeps_pythons_variables_out(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv(
        "PATH", str(tmp_path)
    )  # neither apptainer nor singularity: apptainer's names
    for name in ("APPTAINER_BIND", "SINGULARITY_BIND", *container_images.HOST_PATHS):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "big").mkdir()
    (tmp_path / "scratch").symlink_to(tmp_path / "big")
    (tmp_path / "wheels").mkdir()
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("APPTAINER_BIND", "/data:/in")
    values = container_images.environment(config_of("cpu", work=str(tmp_path / "scratch" / "work")))
    assert values["APPTAINERENV_PYTHONPATH"] == ""
    assert values["APPTAINERENV_PYTHONNOUSERSITE"] == "1"
    here, work = tmp_path / "here", tmp_path / "big" / "work"
    assert values["APPTAINER_BIND"].split(",") == [
        "/data:/in", f"{here}/results", f"{work}", f"{work}:{tmp_path}/scratch/work",
        f"{here}/.cache", f"{ROOT}", f"{tmp_path}/wheels",
    ]  # fmt: skip
    assert work.is_dir()
    elsewhere = config_of("cpu") | {"training": {"source": str(tmp_path / "big")}}
    assert str(tmp_path / "big") in container_images.environment(elsewhere)["APPTAINER_BIND"].split(
        ","
    )
    monkeypatch.setenv("APPTAINER_BIND", values["APPTAINER_BIND"])
    again = container_images.environment(config_of("cpu", work=str(tmp_path / "scratch" / "work")))
    assert again == values  # a Snakemake inside a job adds nothing


def test_a_root_that_cannot_be_made_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^paths\.work cannot be made .*; choose another$"):
        container_images.environment(config_of("cpu", work="file/work"))


# The image itself, and the chain inside it.


class Inside(Workspace):
    """A copy of the repository that has the built image recorded, and its own `python` that fails.

    So a stage that ran on the host instead of in the image would end with exit code 97.
    """

    def __init__(self, directory: Path, image) -> None:
        directory.mkdir()
        super().__init__(directory)
        (directory / "containers" / "images.yaml").write_text(image.record, encoding="utf-8")
        (directory / "host").mkdir()
        (directory / "host" / "python").write_text("#!/bin/sh\nexit 97\n")
        (directory / "host" / "python").chmod(0o755)
        self.environment = os.environ | image.environment
        self.environment["PATH"] = f"{directory / 'host'}{os.pathsep}{self.environment['PATH']}"
        self.environment["CUDA_VISIBLE_DEVICES"] = ""

    def run(self, command: list, check: bool = True):
        """Run a command here; as Workspace does, but with the environment of the image."""
        done = subprocess.run(
            [str(part) for part in command],
            cwd=self.directory,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if check and done.returncode:
            pytest.fail(f"{' '.join(map(str, command))}\n{done.stdout[-6000:]}")
        return done

    def inside(self, image, *command: str, **variables: str) -> str:
        """Return what a command prints in the image, entered as a rule of several nodes enters it."""
        file = self.directory / container_images.image_file(image.address)
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            self.run(["apptainer", "pull", "--name", file, image.address])
        shell = f'{container_images.exec_command(image.address)} "$@" 2>&1'
        config = config_of("cpu")
        added = {"APPTAINER_BIND": "", **variables}
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.directory)
            for key, value in added.items():
                patch.setenv(key, value)
            added |= container_images.environment(config)
        done = subprocess.run(
            ["bash", "-c", shell, "bash", *command],
            cwd=self.directory,
            env=self.environment | added,
            capture_output=True,
            text=True,
        )
        return done.stdout


@pytest.fixture(scope="session")
def chain(cpu_image, tmp_path_factory) -> Inside:
    """The whole chain, run with every rule in the image; do not change it."""
    workspace = Inside(tmp_path_factory.mktemp("inside") / "copy", cpu_image)
    workspace.snakemake(IN_APPTAINER)
    return workspace


def test_the_chain_runs_with_every_rule_in_its_image(chain, cpu_image):
    assert (chain.directory / "results/tests/report.html").is_file()
    image = chain.inside(
        cpu_image, "python", "-c", "import platform; print(platform.python_version())"
    )
    version = image.splitlines()[-1]
    manifests = list((chain.directory / "results/tests").rglob("*.json"))
    versions = {
        path.relative_to(chain.directory / "results/tests").as_posix(): json.loads(
            path.read_text()
        )["versions"]["python"]
        for path in manifests
        if path.with_suffix("").is_dir() and "versions" in path.read_text()
    }
    assert {"base.json", "corpus.json", "trained.json", "merged.json"} <= set(versions)
    assert set(versions.values()) == {version}


def test_on_the_host_the_same_rules_would_have_failed(cpu_image, tmp_path):
    done = Inside(tmp_path / "copy", cpu_image).snakemake("download_model", check=False)
    assert done.returncode
    assert "exit code 97" in done.stdout or "exit status 97" in done.stdout, done.stdout


def test_another_image_runs_its_rules_again_and_the_same_none(chain, cpu_image):
    assert chain.planned(None, IN_APPTAINER) == {}
    other = {"container": {"image": cpu_image.base}}
    assert set(chain.planned(other, IN_APPTAINER)) >= {"download_model", "train", "perplexity"}


def test_without_apptainer_the_image_makes_no_difference(workspace):
    workspace.snakemake("download_model")
    other = {"container": {"image": f"docker://a/b@sha256:{'3' * 64}"}}
    done = workspace.snakemake("-n", "download_model", overrides=other)
    assert "Nothing to be done" in done.stdout, done.stdout


def test_a_wrong_digest_is_refused(cpu_image, tmp_path):
    workspace = Inside(tmp_path / "copy", cpu_image)
    wrong = re.sub(r"[0-9a-f]{64}$", "0" * 64, cpu_image.address)
    done = workspace.snakemake(IN_APPTAINER, overrides={"container": {"image": wrong}}, check=False)
    assert done.returncode
    assert "Failed to pull singularity image" in done.stdout
    assert not (workspace.directory / "results/tests/base.json").exists()


def test_a_missing_sif_is_refused_with_the_command_that_makes_it(cpu_image, tmp_path):
    workspace = Inside(tmp_path / "copy", cpu_image)
    (workspace.directory / "containers" / "images.yaml").write_text("cpu: null\ncuda: null\n")
    done = workspace.snakemake(IN_APPTAINER, check=False)
    assert done.returncode
    assert "run `make sif IMAGE=cpu`" in done.stdout
    assert "Traceback" not in done.stdout
    assert not (workspace.directory / "results/tests/base.json").exists()
    assert workspace.snakemake("-n", IN_APPTAINER).returncode == 0  # a plan needs no image


def test_nothing_of_the_hosts_python_leaks_in(chain, cpu_image, tmp_path):
    """A module is found on the host by each of three ways, and in the image by none."""
    for place in (tmp_path, chain.directory / ".local/lib/python3.11/site-packages"):
        place.mkdir(parents=True, exist_ok=True)
        (place / "leaked.py").write_text("")
    assert importlib.util.find_spec("pytest") is not None
    variables = {"PYTHONPATH": str(tmp_path), "PYTHONUSERBASE": str(chain.directory / ".local")}
    find = "import importlib.util as u; print([m for m in {} if u.find_spec(m)])"
    modules = ["leaked", "pytest", "ruff", "numpy"]
    inside = chain.inside(cpu_image, "python", "-c", find.format(modules), **variables)
    assert inside.splitlines()[-1] == "['numpy']"
    host = subprocess.run(
        [sys.executable, "-c", find.format(modules)],
        env=os.environ | variables | {"PYTHONNOUSERSITE": ""}, capture_output=True, text=True,
    )  # fmt: skip
    assert host.stdout.strip() == "['leaked', 'pytest', 'ruff', 'numpy']"


LOOK = """
import importlib.metadata as m, json, os, pathlib, stat
files = [p for p in pathlib.Path("/opt").rglob("*") if not p.is_symlink()]
print(json.dumps({
    "path": os.environ["PATH"],
    "packages": {d.metadata["Name"].lower().replace("_", "-"): d.version for d in m.distributions()},
    "recipe": pathlib.Path("/opt/longyarn/recipe").read_text().strip(),
    "opt": sorted(os.listdir("/opt")),
    "mnt": os.listdir("/mnt"),
    "root": sorted(os.listdir("/root")),
    "pip": [p for p in ("/etc/pip.conf", "/etc/xdg/pip/pip.conf") if os.path.exists(p)],
    "writable": [str(p) for p in files if p.stat().st_mode & stat.S_IWOTH],
    "settings": [str(p) for p in files if p.name in ("pip.conf", ".netrc", "uv.toml")],
    "read_only": not os.access("/opt/longyarn", os.W_OK),
    "cluster": m.version("deepspeed") and __import__("deepspeed.git_version_info").git_version_info
        .installed_ops["deepspeed_shm_comm"],
}))
"""


def test_the_image_has_what_the_locks_say_and_nothing_of_its_builder(chain, cpu_image):
    said = chain.inside(
        cpu_image, "python", "-c", LOOK, PIP_FIND_LINKS=""
    )  # else bound: it is ours
    inside = json.loads(said.splitlines()[-1])
    assert inside["path"].startswith("/opt/longyarn/bin:")
    for name in container_images.LOCKS["cpu"]:
        for (package, marker), (version, _) in pins(name).items():
            if not marker:
                assert inside["packages"][package] == version
    assert inside["recipe"] == container_images.recipe("cpu", "Dockerfile", ROOT)
    assert inside["opt"] == ["longyarn"]
    assert inside["mnt"] == inside["pip"] == inside["settings"] == inside["writable"] == []
    assert set(inside["root"]) <= {".bashrc", ".profile"}
    assert inside["read_only"]
    assert inside["cluster"]


TALK = """
import os, torch, deepspeed
deepspeed.init_distributed("gloo")
ones = torch.ones(4)
deepspeed.comm.all_reduce(ones)
kind = type(deepspeed.comm.comm.cdb.shm_comm_op).__name__
os.write(1, f"{ones.tolist()} {kind}\\n".encode())  # whole, though two processes write
"""


def test_two_processes_in_the_image_talk_without_compiling(chain, cpu_image):
    (chain.directory / "talk.py").write_text(TALK)
    launch = ["python", "scripts/launch.py", "1", "--nproc-per-node", "2", "talk.py"]
    compiled = chain.directory / "compiled"
    said = chain.inside(cpu_image, *launch, TORCH_EXTENSIONS_DIR=str(compiled))
    assert said.count("[2.0, 2.0, 2.0, 2.0] module") == 2, said
    assert not compiled.exists()


def test_the_image_is_not_roots_and_its_history_tells_nothing(chain, cpu_image):
    inspect = ["skopeo", "inspect", "--config", "--tls-verify=false", cpu_image.address]
    text = chain.run(inspect).stdout
    config = json.loads(text)["config"]
    assert config["User"].split(":")[0] not in ("", "0", "root")
    assert config["Labels"]["longyarn.recipe"] == container_images.recipe("cpu", "Dockerfile", ROOT)
    assert "PYTHONNOUSERSITE=1" in config["Env"]
    for word in ("PIP_", "find-links", "wheels", "TOKEN", "PASSWORD", "CERT"):
        assert word not in text


def test_what_needs_a_gpu_is_said_to_be_unproved(chain, cpu_image, capsys):
    said = chain.inside(cpu_image, "python", "containers/check.py")
    lines = [line for line in said.splitlines() if line.startswith(("ok", "unproved", "error"))]
    with capsys.disabled():
        print("\nof the images, on this machine:", *lines, sep="\n  ")
    assert len(lines) == 4
    assert not any(line.startswith("error") for line in lines)
