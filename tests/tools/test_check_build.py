"""What a build prints of warnings is found, and what it says of the machine is not taken for one."""

from tests.conftest import REPOSITORY, load_script

TOOL = load_script(REPOSITORY / "tools" / "check_build.py")
OUTPUT = """\
/tmp/build-env/lib/python3.11/site-packages/setuptools/config/_apply_pyprojecttoml.py:82: \
SetuptoolsDeprecationWarning: `project.license` as a TOML table is deprecated
!!

  By 2027-Feb-18, you need to update your project and remove deprecated calls
!!
  corresp(dist, value, root_dir)
warning: build_py: byte-compiling is disabled, skipping.
copying mmoe/warnings.py -> build/lib/mmoe
"""


def test_a_deprecation_is_found_in_the_output_of_a_build():
    found = TOOL.warned(OUTPUT + OUTPUT)
    assert found == ["SetuptoolsDeprecationWarning: `project.license` as a TOML table is deprecated"]


def test_a_build_without_warnings_has_none():
    assert TOOL.warned("\n".join(OUTPUT.splitlines()[6:])) == []
