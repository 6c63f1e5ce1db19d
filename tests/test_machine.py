"""What the machine and its environment do to a run: caches, compilers, folders, launchers, memory, Ctrl-C."""

import os
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from conftest import pretend_world_size
from torch._inductor import codecache, exc

from utils import launchers, machine, many_prompts, memory, pipeline_utils, random_weights, start
from utils.benchmark_utils import check_args
from utils.common import RecipeError
from utils.hardware import Hardware, detect
from utils.launchers import world_size
from utils.machine import available_memory, kernel_cache, use_kernel_cache
from utils.memory import check_cpu_memory
from utils.pipeline_utils import load_pipeline
from utils.plan import make_plan

ROOT = Path(__file__).parent.parent
TINY = random_weights.architecture("tiny-flux")
FLUX = random_weights.architecture("FLUX.1-dev")
CPU = Hardware("cpu")
VARIABLES = ("CXX", "CC", "HF_HOME", "XDG_CACHE_HOME", "TMPDIR", "TEMP", "TMP", "LOGNAME", "USER", "LNAME", "USERNAME",
             "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", *launchers.LAUNCHER, *launchers.MPI_SIZES)


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    """None of the variables is set, nothing was noted, and all that a test changes is put back."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that it is put back, whatever is done to it
        monkeypatch.delenv(name)
    monkeypatch.setattr(start, "notes", [])
    monkeypatch.setattr(machine, "GIVEN", dict.fromkeys(start.GIVEN))
    for name in ("_HEADER_DIR", "_HEADER_LOCK_DIR"):
        monkeypatch.setattr(codecache, name, getattr(codecache, name))


@pytest.fixture(autouse=True)
def _compiler_of_inductor():
    """What `settle_compilers` sets in torch ends with the test."""
    with torch._inductor.config.patch({"cpp.cxx": torch._inductor.config.cpp.cxx}):
        yield


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Makes an executable file in a folder that alone is in PATH."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "bin").mkdir()

    def make(name, code=0, mode=0o755):
        path = tmp_path / "bin" / name
        path.write_text(f"#!/bin/sh\nexit {code}\n")
        path.chmod(mode)
        return path

    return make


# --- caches ---

def test_use_kernel_cache_is_below_the_flag_whatever_a_library_has_filled_in(tmp_path, monkeypatch):
    made = tmp_path / "torchinductor_me"
    made.mkdir()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(made))
    assert kernel_cache(str(tmp_path / "c")) == tmp_path / "c" / "inductor"
    use_kernel_cache(str(tmp_path / "c"))
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == codecache.cache_dir() == str(tmp_path / "c" / "inductor")
    for place in (os.environ["TRITON_CACHE_DIR"], codecache._HEADER_DIR, codecache._HEADER_LOCK_DIR):
        assert Path(place).is_relative_to(tmp_path / "c" / "inductor")
    assert not made.exists() and not any((tmp_path / "c" / "inductor").iterdir())


def test_use_kernel_cache_folders_of_the_user_win(tmp_path, monkeypatch):
    given = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "i"), "TRITON_CACHE_DIR": str(tmp_path / "t"),
             "TRITON_HOME": None}
    monkeypatch.setattr(machine, "GIVEN", given)
    monkeypatch.setenv("TRITON_CACHE_DIR", given["TRITON_CACHE_DIR"])
    use_kernel_cache(str(tmp_path / "c"))
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == given["TORCHINDUCTOR_CACHE_DIR"]
    assert os.environ["TRITON_CACHE_DIR"] == given["TRITON_CACHE_DIR"] and not (tmp_path / "c").exists()


@pytest.mark.parametrize("name", ["a file/x", "~nobody-of-that-name/x", "nul\0"])
def test_use_kernel_cache_that_cannot_be_made_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a file").write_bytes(b"")
    with pytest.raises(RecipeError, match="--cache-dir"):
        use_kernel_cache(name)


def test_load_pipeline_with_a_cache_that_cannot_be_made_loads_nothing(make_args, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setattr(pipeline_utils.DiffusionPipeline, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(RecipeError, match="--cache-dir"):
        load_pipeline(make_args("--ckpt", "tiny-flux", "--quant_dtype", "int8", "--cache-dir", str(tmp_path / "file")))


@pytest.mark.slow
def test_gen_image_compiled_kernels_are_in_the_cache_dir_and_nowhere_else(tmp_path):
    """A process of its own, whose temporary folder is empty at the start."""
    (tmp_path / "tmp").mkdir()
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    done = subprocess.run(
        [sys.executable, "gen_image.py", "--ckpt", "tiny-flux", "--device", "cpu", "--compile_export_mode", "compile",
         "--num_inference_steps", "1", "--cache-dir", str(tmp_path / "c"), "--output-file", str(tmp_path / "x.png")],
        cwd=ROOT, capture_output=True, text=True, env=environment | {"TMPDIR": str(tmp_path / "tmp")}, timeout=500)
    assert done.returncode == 0, done.stderr
    assert any((tmp_path / "c" / "inductor").rglob("*.so")) and any((tmp_path / "c" / "inductor").rglob("*.gch"))
    assert not any((tmp_path / "tmp").iterdir())


# --- compilers ---

@pytest.mark.parametrize("wanted, found", [
    ("good", "good"), ("ccache good", "good"), ("ccache", "g++"), ("bad", "g++"), ("absent", "g++"), ("no_x", "g++"),
    ("sccache bad", "g++"), ("good -std=c++17", "good"), ("/bin", "g++"), ("'unclosed", "g++"), ("", "g++")])
def test_compiler_of_words_is_the_first_executable_that_works(program, wanted, found):
    for name in ("good", "ccache", "sccache", "clang++", "g++"):
        program(name)
    program("bad", code=1), program("no_x", mode=0o644)
    assert start.compiler_of(wanted, ("c++", "g++", "clang++")) == found


def test_compiler_of_path_with_a_space_is_the_path(program):
    assert start.compiler_of(str(program("my g++")), ()) == str(program("my g++"))


def test_settle_compilers_sets_working_ones_and_notes_each_change(program, monkeypatch):
    program("ccache"), program("clang++"), program("bad", code=1)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("CC", "ccache absent")
    start.settle_compilers()  # torch alone would take g++, which is not there
    assert os.environ["CXX"] == "clang++" and "CC" not in os.environ and len(start.notes) == 1
    start.settle_compilers()
    assert os.environ["CXX"] == "clang++" and len(start.notes) == 1
    monkeypatch.setenv("CXX", "bad")
    monkeypatch.setenv("CC", "ccache clang++")
    start.settle_compilers()
    assert (os.environ["CXX"], os.environ["CC"]) == ("clang++", "clang++") and len(start.notes) == 3
    (Path(os.environ["PATH"]) / "clang++").unlink()
    monkeypatch.setenv("CXX", "bad")
    start.settle_compilers()
    assert "CXX" not in os.environ and machine.cpp_compiler() is None
    assert machine.compiler_obstacle()


@pytest.mark.skipif(sys.platform != "linux", reason="libstdc++ is Linux's")
@pytest.mark.parametrize("named", [True, False], ids=["CXX", "first on the PATH"])
def test_settle_compilers_takes_the_first_one_that_finds_libstdcxx(tmp_path, monkeypatch, named):
    for folder, found in (("a", "libstdc++.so"), ("b", "/usr/lib/libstdc++.so")):
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / "g++"
        path.write_text(f"#!/bin/sh\necho {found}\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'a'}{os.pathsep}{tmp_path / 'b'}")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    if named:
        monkeypatch.setenv("CXX", str(tmp_path / "a" / "g++"))
    monkeypatch.setattr(start, "notes", [])
    # In a script that imports torchao before utils, torch has read CXX already.
    with torch._inductor.config.patch({"cpp.cxx": (None, str(tmp_path / "a" / "g++"))}):
        start.settle_compilers()
        assert os.environ["CXX"] == str(tmp_path / "b" / "g++") and len(start.notes) == 1
        assert torch._inductor.config.cpp.cxx == (None, os.environ["CXX"])
    assert machine.libstdcxx_obstacle() is None
    start.settle_compilers()
    assert len(start.notes) == 1
    (tmp_path / "b" / "g++").unlink()
    monkeypatch.setenv("CXX", str(tmp_path / "a" / "g++"))
    start.settle_compilers()
    assert os.environ["CXX"] == str(tmp_path / "a" / "g++") and "libstdc++.so" in machine.libstdcxx_obstacle()


def test_triton_obstacle_is_a_missing_compiler_or_header_until_something_is_compiled(tmp_path, program, monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
    for name in ("TRITON_CACHE_DIR", "TRITON_HOME", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.setitem(start.GIVEN, name, None)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(machine.sysconfig, "get_path", lambda name: str(tmp_path / "include"))
    monkeypatch.setattr(machine.sys, "platform", "linux")
    assert "C compiler" in machine.triton_obstacle(str(tmp_path))
    program("gcc")
    assert "Python.h" in machine.triton_obstacle(str(tmp_path))
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "Python.h").touch()
    assert machine.triton_obstacle(str(tmp_path)) is None
    monkeypatch.setenv("CC", "absent")
    assert "C compiler" in machine.triton_obstacle(str(tmp_path))
    (machine.triton_cache(str(tmp_path)) / "abc").mkdir(parents=True)
    assert machine.triton_obstacle(str(tmp_path)) is None


def planned(args):
    """The decision on compilation, on this machine, for a recipe that compiles."""
    args.quant_dtype = "int8"
    return make_plan(args, TINY, detect(args)).compile


def test_plan_without_python_h_has_packages_and_no_torch_compile(make_args, tmp_path, monkeypatch):
    monkeypatch.setattr(machine.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(machine.sys, "platform", "linux")
    monkeypatch.setattr(machine, "libstdcxx_obstacle", lambda: None)
    assert planned(make_args()).mode == "export_aoti"
    for flags in (["--vae_tiling"], ["--compile_export_mode", "compile"]):
        with pytest.raises(RecipeError, match=r"Python\.h"):
            planned(make_args(*flags))


@pytest.mark.parametrize("error", [
    exc.InductorError(exc.CppCompileError(["g++"], "x\nx.cpp:1: fatal error: omp.h: absent"), None),
    exc.CppCompileError(["g++"], "x.cpp:1: fatal error: omp.h: absent"),
    subprocess.CalledProcessError(1, "gcc"), RuntimeError("Failed to find C compiler."),
    exc.InvalidCxxCompiler(), ImportError("x.so: failed to map segment from shared object")],
    ids=lambda error: type(error).__name__)
def test_compiling_failed_compiler_is_a_recipe_error(error):
    with pytest.raises(RecipeError, match="--compile_export_mode") as found, machine.compiling():
        raise error
    assert "\n" not in str(found.value) and ("omp.h" in str(found.value)) == ("omp.h" in str(error))


@pytest.mark.parametrize("error", [RecipeError("x"), torch.OutOfMemoryError("x"), ValueError("x"),
                                   exc.InductorError(torch.OutOfMemoryError("x"), None)],
                         ids=lambda error: type(error).__name__)
def test_compiling_other_errors_pass_unchanged(error):
    with pytest.raises(type(error)) as found, machine.compiling():
        raise error
    assert found.value is error


def test_plan_folders_mounted_noexec_are_not_compiled_into(make_args, tmp_path, monkeypatch):
    """The kernel cache need not be there yet. Packages are unpacked into the temporary folder."""
    kernels, temporary = tmp_path / "noexec", tmp_path / "tmp"
    kernels.mkdir(), temporary.mkdir()
    forbidden = [kernels]
    monkeypatch.setattr(machine.os, "statvfs", lambda path: SimpleNamespace(
        f_flag=os.ST_NOEXEC if Path(path) in forbidden else 0))
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(machine, "compiler_obstacle", lambda: None)
    monkeypatch.setattr(machine, "libstdcxx_obstacle", lambda: None)
    cache = ["--cache-dir", str(kernels / "a" / "b")]
    for flags in ([], ["--compile_export_mode", "compile"], ["--compile_export_mode", "export_aoti"]):
        with pytest.raises(RecipeError, match=r"noexec.*--cache-dir"):
            planned(make_args(*cache, *flags))
    assert planned(make_args(*cache, "--use-cached-model")).mode == "export_aoti"
    forbidden[:] = [temporary]
    compiles = planned(make_args(*cache))
    assert compiles.mode == "compile" and "TMPDIR" in compiles.no_packages
    with pytest.raises(RecipeError, match=r"--use-cached-model.*noexec.*TMPDIR"):
        planned(make_args(*cache, "--use-cached-model"))


# --- folders ---

def test_settle_temporary_folder_that_cannot_be_written_is_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    start.settle_temporary_folder()
    assert os.environ["TMPDIR"] == str(tmp_path) and start.notes == []
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "absent"))
    start.settle_temporary_folder()
    assert os.environ["TMPDIR"] == tempfile.gettempdir() != str(tmp_path / "absent")
    assert "absent" in start.notes[0]


@pytest.mark.parametrize("home", [None, "", "relative", "/nonexistent"])
def test_settle_home_without_a_home_is_a_private_folder(tmp_path, monkeypatch, home):
    pwd = pytest.importorskip("pwd")
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: (_ for _ in ()).throw(KeyError(uid)))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("HOME", home) if home is not None else monkeypatch.delenv("HOME")
    start.settle_home()
    found = Path.home()
    assert found.parent == tmp_path and stat.S_IMODE(found.stat().st_mode) == 0o700 and len(start.notes) == 1
    assert start.default_cache_dir() == found / ".cache" / "flux-fast"
    assert os.environ["LOGNAME"], "PyTorch names folders after the user"


def test_settle_home_that_cannot_be_written_is_still_read(tmp_path, monkeypatch):
    """Models and tokens that lie there stay in use; what is not there yet goes elsewhere."""
    home = tmp_path / "home"
    (home / ".cache" / "huggingface").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: not Path(path).is_relative_to(home) and access(path, mode))
    start.settle_home()
    assert Path.home() == home and "HF_HOME" not in os.environ
    assert start.default_cache_dir() == start.private_folder() / "flux-fast" and len(start.notes) == 1
    (home / ".cache" / "huggingface").rmdir()
    start.settle_home()
    assert Path(os.environ["HF_HOME"]).parent == start.private_folder()


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="Windows has no modes")
@pytest.mark.parametrize("taken", ["link", "file", "open", "of another"])
def test_private_folder_whose_name_is_taken_is_a_new_one(tmp_path, monkeypatch, taken):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    name = tmp_path / f"flux-fast-{os.getuid()}"
    assert start.private_folder() == start.private_folder() == name
    if taken == "open":
        name.chmod(0o777)
    elif taken == "of another":
        monkeypatch.setattr(start, "uid", lambda: os.getuid() + 1)
        (tmp_path / f"flux-fast-{os.getuid() + 1}").mkdir(mode=0o700)
    else:
        name.rmdir()
        (tmp_path / "x").mkdir(mode=0o700)
        name.symlink_to(tmp_path / "x") if taken == "link" else name.write_bytes(b"")
    found = start.private_folder()
    assert found.parent == tmp_path and found.name not in (name.name, f"flux-fast-{os.getuid() + 1}")
    assert stat.S_IMODE(found.stat().st_mode) == 0o700


# --- launchers ---

@pytest.mark.parametrize("variables", [
    {}, {"WORLD_SIZE": "1"}, {"WORLD_SIZE": ""}, {"RANK": "3"}, {"LOCAL_RANK": "3"}, {"OMPI_COMM_WORLD_SIZE": "1"},
    {"PMI_SIZE": "0"}, {"SLURM_NTASKS": "8"}, {"MASTER_ADDR": "x", "MASTER_PORT": "y"}], ids=str)
def test_launched_without_a_launcher_of_several_is_one(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert world_size() == 1


def test_launched_by_torchrun_is_its_number_of_processes(monkeypatch):
    pretend_world_size(monkeypatch, 4, rank=3)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")  # `srun torchrun` on two hosts
    assert world_size() == 4


@pytest.mark.parametrize("name, value", [
    ("WORLD_SIZE", "many"), ("WORLD_SIZE", "0"), ("WORLD_SIZE", "-2"), ("WORLD_SIZE", "2.0"), ("RANK", "2"),
    ("RANK", "x"), ("LOCAL_RANK", "7"), ("LOCAL_RANK", "-1"), ("MASTER_PORT", "http"), ("MASTER_PORT", "70000"),
    ("RANK", ""), ("LOCAL_RANK", ""), ("MASTER_ADDR", ""), ("MASTER_PORT", "")])
def test_check_args_impossible_variables_of_a_launcher_are_refused(make_args, monkeypatch, name, value):
    pretend_world_size(monkeypatch, 2)
    monkeypatch.setenv(name, value)
    with pytest.raises(RecipeError, match=name):
        check_args(make_args())


@pytest.mark.parametrize("name", launchers.MPI_SIZES)
def test_check_args_and_join_processes_refuse_mpi_launchers(make_args, monkeypatch, name):
    monkeypatch.setenv(name, "2")
    for call in (check_args, many_prompts.join_processes):
        with pytest.raises(RecipeError, match=f"torchrun.*{name}|{name}.*torchrun"):
            call(make_args("--prompts-file", "README.md"))


def test_join_processes_of_one_process_ignores_other_launchers(make_args, monkeypatch):
    """accelerate would wait for the others, or for MASTER_ADDR."""
    for name, value in dict(OMPI_COMM_WORLD_SIZE="1", OMPI_COMM_WORLD_RANK="0", PMI_RANK="5", MPI_LOCALNRANKS="4",
                            MV2_COMM_WORLD_LOCAL_RANK="2", LOCAL_RANK="3", RANK="1").items():
        monkeypatch.setenv(name, value)
    for name in ("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE"):
        monkeypatch.setenv(name, "1")
    before = dict(PartialState._shared_state)
    PartialState._reset_state()
    try:
        assert many_prompts.join_processes(make_args("--prompts-file", "README.md")).num_processes == 1
    finally:
        PartialState._reset_state()
        PartialState._shared_state.update(before)
    assert not [name for name in os.environ if name.startswith(("OMPI_", "PMI_", "MPI_LOCAL")) or name == "LOCAL_RANK"]


def test_join_processes_more_than_gpus_are_refused(make_args, monkeypatch):
    pretend_world_size(monkeypatch, 4, rank=2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    args = make_args("--prompts-file", "README.md")
    args.device = "cuda"
    with pytest.raises(RecipeError, match=r"\b4\b.*\b2\b"):
        many_prompts.join_processes(args)


# --- memory ---

@pytest.mark.parametrize("version", [1, 2])
def test_available_memory_is_the_least_of_all_control_groups_above(tmp_path, version):
    names = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
             2: ("memory.max", "memory.current", "inactive_file")}[version]
    mount = tmp_path / "memory" if version == 1 else tmp_path
    own = mount / "pod" / "me"
    own.mkdir(parents=True)
    (tmp_path / "cgroup").write_text("5:cpu,memory:/pod/me\n1:cpu:/x\n" if version == 1 else "0::/pod/me\n")

    def limit(folder, most, used, cached):
        for name, text in zip((*names[:2], "memory.stat"), (most, used, f"anon 7\n{names[2]} {cached}"), strict=True):
            (folder / name).write_text(f"{text}\n")

    def available():
        return available_memory(str(tmp_path), str(tmp_path / "cgroup"))

    assert available() > 0  # without a limit: the memory of the machine
    limit(own, 5000, 3000, 500)
    assert available() == 2500
    limit(own.parent, 4000, 3900, 0)
    assert available() == 100
    limit(own.parent, "max" if version == 2 else 2**63 - 4096, 3900, 0)
    assert available() == 2500
    limit(own, 100, 3000, 0)
    assert available() == 0


def test_load_pipeline_of_a_model_that_does_not_fit_loads_nothing(make_args, monkeypatch):
    for module, name in ((random_weights, "build"), (pipeline_utils.DiffusionPipeline, "from_pretrained")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("weights were loaded first"))
    monkeypatch.setattr(memory, "available_memory", lambda: 16 * 2**30)
    with pytest.raises(RecipeError, match=r"31\.4 GiB.*16\.0 GiB"):
        load_pipeline(make_args("--random_weights", "--ckpt", "FLUX.1-dev"))


def test_check_cpu_memory_refuses_one_byte_too_few(build, monkeypatch):
    pipeline = build("tiny-flux", torch.bfloat16)
    held = sum(p.numel() * p.itemsize for name in ("transformer", "text_encoder", "text_encoder_2", "vae")
               for p in getattr(pipeline, name).parameters())
    monkeypatch.setattr(memory, "available_memory", lambda: held)
    check_cpu_memory(TINY, torch.bfloat16)
    for left, dtype in ((held - 1, torch.bfloat16), (held, torch.float32)):
        monkeypatch.setattr(memory, "available_memory", lambda left=left: left)
        with pytest.raises(RecipeError):
            check_cpu_memory(TINY, dtype)


# --- ends ---

@pytest.fixture
def terminal():
    """Ctrl-C as in a terminal. A shell, such as one of CI, has it ignored in the jobs of its background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("terminal")
def test_gen_image_ctrl_c_while_libraries_load_is_exit_code_130(tmp_path):
    """-X importtime says what has been loaded, line by line."""
    process = subprocess.Popen([sys.executable, "-X", "importtime", "gen_image.py", "--ckpt", "tiny-flux",
                                "--output-file", str(tmp_path / "x.png")], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if "torch._environment" in line:
            process.send_signal(signal.SIGINT)
            break
    rest = process.stderr.read()
    assert process.wait(60) == 130 and "Traceback" not in rest


@pytest.mark.usefixtures("terminal")
def test_take_back_and_hand_over_set_the_handler_of_the_scripts_alone(monkeypatch, capsys):
    start.take_back()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler and not start.is_our_script()
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(ROOT / "gen_image.py"),
                        raising=False)  # in a worker of pytest-xdist it has none
    start.take_back()
    assert signal.getsignal(signal.SIGINT) is start.end_at_once
    start.notes.append("something else")
    monkeypatch.setattr(sys, "argv", ["gen_image.py", "--help"])
    start.hand_over()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys, "argv", ["gen_image.py"])
    start.hand_over()
    assert "something else" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has neither")
def test_gen_image_help_without_a_home_and_output_without_a_reader_end_quietly(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "HOME"} | {"TMPDIR": str(tmp_path)}
    help_ = ("import pwd, runpy, sys; pwd.getpwuid = {}.__getitem__; sys.argv = ['gen_image.py', '--help'];"
             "runpy.run_path('gen_image.py', run_name='__main__')")
    result = "from utils.common import run_cli; run_cli(lambda: print('x'))"

    def run(code, stdout):
        return subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=stdout, stderr=subprocess.PIPE, text=True,
                              env=environment)

    done = run(help_, subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("usage: gen_image.py")
    for code, codes in ((help_, (0, 141)), (result, (141,))):  # argparse forgives it
        reader, writer = os.pipe()
        os.close(reader)
        done = run(code, writer)
        os.close(writer)
        assert done.returncode in codes and "Traceback" not in done.stderr and "ignored" not in done.stderr
