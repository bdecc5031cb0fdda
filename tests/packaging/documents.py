"""The documentation that packages bring, whose pages refer to each other."""

from tests.testbed.package_root import PackageRoot

# prints the references of a directory's pages that lead nowhere
DEAD = r"""
import pathlib, re, sys
for page in sorted(pathlib.Path(sys.argv[1]).rglob("*.md")):
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if "://" not in target and not (page.parent / target).exists():
            print(f"{page}: {target}")
"""


def dead_references(root: PackageRoot, directory: str) -> str:
    """The references that lead nowhere, a line each."""
    pages = root.run("find", directory, "-name", "*.md").split()
    assert f"{directory}/README.md" in pages
    assert root.run("head", "-n1", f"{directory}/README.md") == "# igvmfw\n"
    return root.run("python3", "-c", DEAD, directory)
