"""What `import omnicodec_jax` gives, and what it costs."""

import subprocess
import sys

import pytest

import omnicodec_jax

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("name", omnicodec_jax.__all__)
def test_every_public_name_is_there_and_listed(name):
    assert getattr(omnicodec_jax, name) is not None
    assert name in dir(omnicodec_jax)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Tokeniser'"):
        _ = omnicodec_jax.Tokeniser


def test_importing_the_package_imports_neither_jax_nor_torch():
    code = "import sys, omnicodec_jax; print([name for name in ('jax', 'torch', 'numpy') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
