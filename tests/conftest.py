"""Eight virtual CPU devices for every test, before any backend starts."""

import os
import tempfile

import hypothesis
import jax
import pytest

from bigbatch.models import WideResNetConfig
from tests import imagenet_files, trained

jax.config.update("jax_num_cpu_devices", 8)

# Of the programs that several tests and their processes compile, each is compiled once.
_programs = tempfile.TemporaryDirectory(prefix="bigbatch-programs-")
for _name, _value in {
    "jax_compilation_cache_dir": _programs.name,
    "jax_persistent_cache_min_compile_time_secs": 0.1,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}.items():
    # JAX has read what the environment said already.
    if os.environ.setdefault(_name.upper(), str(_value)) == str(_value):
        jax.config.update(_name, _value)

# CI draws the same examples every time, so that it judges the change and not the draw. Nowhere is
# the machine's speed judged.
hypothesis.settings.register_profile("anywhere", deadline=None)
hypothesis.settings.register_profile("ci", derandomize=True, deadline=None)
hypothesis.settings.register_profile("thorough", max_examples=1_000, deadline=None)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "anywhere")


@pytest.fixture(scope="session")
def imagenet(tmp_path_factory) -> imagenet_files.Prepared:
    """A tiny imagenet2012 in both file formats; copy what is to be changed."""
    return imagenet_files.prepare(tmp_path_factory.mktemp("imagenet"))


@pytest.fixture(scope="module")
def quick_networks():
    """Each wide ResNet is the network of `trained.quick`, where no test asks which one it is."""

    def module(self, **how):
        return trained.ConvolutionConfig(dtype=self.dtype).module(**how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WideResNetConfig, "module", module)
        yield


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved."""
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig

    def keep(figure, *args, **kwargs):
        figures.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


# They need PyTorch, which the project does not.
collect_ignore = [
    *(f"benchmarks/{name}_torch.py" for name in ("growing", "language")),
    "accelerator/torch_peers.py",
]
