"""A folder holds the classes that a person would list in it, or it is refused in one sentence.

Trees are drawn at random and written to disk; what a person lists is found from what was drawn, not
from the disk. `ADAPTAX_TREES=2000` draws more of them.
"""

import contextlib
import os
import struct
import tempfile
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from adaptax.tasks import files, folder
from adaptax.tasks.layout import split_named

TREES = int(os.environ.get("ADAPTAX_TREES", "30"))
SIDE = 4
ASKED = {"way": 2, "shot": 1, "query": 1, "image_size": SIDE, "splits": (0.4, 0.3, 0.3)}
LEAST = 2
SPLIT_NAMES = {
    "train": ["train", "Train", "TRAINING", "base", "meta-train", "Meta_Training", "train_set"],
    "val": ["val", "Valid", "validation", "dev", "meta_val", "META-VALIDATION"],
    "test": ["test", "Testing", "novel", "meta-test", "testset"],
}
ODD = ["a b", "[x]", "new\nline", "é", "日本", "x" * 250, "-rf", "*", "%s {0}", "a.png",
       "tab\there", "\udce9ytes", "A", "a", "~", "back\\slash", "q?", "'", '"', "trailing.", " ",
       "train1", "tests", "\x1b[31m"]  # fmt: skip
HIDDEN = [".ipynb_checkpoints", "__MACOSX", ".git", ".thumbnails", "@eaDir"]

# What is in a directory: the number of a picture, another directory, or one of these.
TEXT, JUNK, NOWHERE, PIPE = "text", "junk", "nowhere", "pipe"


class Link:
    """To the path of a directory of the tree, or to something outside."""

    def __init__(self, to):
        self.to = to


def png(number):
    """Sixteen greys that tell the number."""
    rng = np.random.default_rng(number)
    rows = rng.integers(0, 256, (SIDE, SIDE), np.uint8)
    data = b"".join(b"\0" + row.tobytes() for row in rows)

    def chunk(kind, content):
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    head = struct.pack(">IIBBBBB", SIDE, SIDE, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(data))
        + chunk(b"IEND", b"")
    )  # fmt: skip


def at(tree, path):
    for part in path:
        tree = tree[part]
    return tree


def put(tree, path, node):
    """Into the tree, with the directories above; nothing if the place is taken."""
    *above, name = path
    for part in above:
        tree = tree.setdefault(part, {})
    tree.setdefault(name, node)


names = st.one_of(
    st.sampled_from(ODD),
    st.text(
        st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=12
    ),
).filter(lambda name: split_named(name) is None and not files.is_hidden(name))


@st.composite
def trees(draw):
    """A tree, and the paths of the folders that were drawn as classes."""
    count = iter(range(10**6))
    tree: dict = {}
    wrapper = draw(st.sampled_from([(), (), ("data",), ("deep", "er")]))
    layout = draw(st.sampled_from(["flat", "flat", "nested", "splits"]))
    if layout == "flat":
        tops = [wrapper]
    elif layout == "nested":
        tops = [(*wrapper, f"group {i}") for i in range(draw(st.integers(1, 3)))]
    else:
        tops = [(*wrapper, draw(st.sampled_from(of))) for of in SPLIT_NAMES.values()]
    each = 7 if layout == "flat" else 9 if layout == "splits" else 8
    chosen = draw(st.lists(names, min_size=each, max_size=each, unique=True))
    classes = [(*tops[i % len(tops)], name) for i, name in enumerate(chosen)]
    for path in classes:
        for _ in range(draw(st.integers(LEAST, 4))):
            name = draw(st.sampled_from(["{}.png", "{}.PNG", "{} [1]\n.Png", "é{}.png"]))
            put(tree, (*path, name.format(next(count))), next(count))
    places = [wrapper, *tops, *classes]
    for _ in range(draw(st.integers(0, 4))):
        here, some = draw(st.sampled_from(places)), draw(st.sampled_from(classes))
        match draw(st.sampled_from(TROUBLES)):
            case "hidden file":
                put(tree, (*here, f".{next(count)}.png"), JUNK)
            case "hidden folder":
                hidden = draw(st.sampled_from(HIDDEN))
                put(tree, (*here, hidden, "of", f"{next(count)}.png"), next(count))
                put(tree, (*here, hidden, f"{next(count)}.png"), JUNK)
            case "text":
                put(tree, (*here, f"notes {next(count)}.txt"), TEXT)
            case "pipe":
                put(tree, (*here, f"pipe {next(count)}.png"), PIPE)
            case "empty folder":
                put(tree, (*here, f"empty {next(count)}"), {})
            case "stray":
                put(tree, (*draw(st.sampled_from([wrapper, *tops])), f"stray {next(count)}.png"),
                    next(count))  # fmt: skip
            case "circle":
                up = draw(st.integers(0, len(here)))
                put(tree, (*here, f"round {next(count)}"), Link(here[:up]))
            case "out of the tree":
                put(tree, (*here, f"up {next(count)}"), Link(".."))
            case "linked class":
                put(tree, (*draw(st.sampled_from(tops)), f"linked {next(count)}"),
                    Link({f"{next(count)}.png": next(count) for _ in range(3)}))  # fmt: skip
            case "linked picture":
                put(tree, (*some, f"linked {next(count)}.png"), Link(next(count)))
            case "broken link":
                put(tree, (*here, f"gone {next(count)}"), NOWHERE)
            case "twin":
                put(tree, (*draw(st.sampled_from(tops)), f"twin {next(count)}"), Link(some))
            case "broken picture":
                put(tree, (*some, f"broken {next(count)}.png"), JUNK)
            case "small class":
                put(tree, (*draw(st.sampled_from(tops)), f"small {next(count)}", "1.png"),
                    next(count))  # fmt: skip
            case "copy":
                other = draw(st.sampled_from(classes))
                of = [node for node in at(tree, other).values() if isinstance(node, int)]
                put(tree, (*some, f"copy {next(count)}.png"), draw(st.sampled_from(of)))
            case "class inside":
                for _ in range(2):
                    put(tree, (*some, "inside", f"{next(count)}.png"), next(count))
            case "split beside":
                put(tree, (*wrapper, "Train", f"class {next(count)}", "1.png"), next(count))
    return tree


TROUBLES = ["hidden file", "hidden folder", "text", "pipe", "empty folder", "stray", "circle",
            "out of the tree", "linked class", "linked picture", "copy", "class inside"] * 2 + [
            "broken link", "twin", "broken picture", "small class", "split beside"]  # fmt: skip


def write(tree, root, outside):
    """The tree on disk; what links lead to lies in another folder."""
    links = []
    for where, node in walk(tree):
        path = root.joinpath(*where)
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(node, dict):
            path.mkdir(exist_ok=True)
        elif isinstance(node, int):
            path.write_bytes(png(node))
        elif node == PIPE:
            os.mkfifo(path)
        elif node == NOWHERE:
            path.symlink_to(outside / "nowhere")
        elif isinstance(node, Link):
            links.append((path, node.to))
        else:
            path.write_bytes(b"junk")
    for number, (path, to) in enumerate(links):
        if isinstance(to, int):
            target = outside / f"{number}.png"
            target.write_bytes(png(to))
        elif isinstance(to, dict):
            target = outside / f"{number}"
            target.mkdir()
            write(to, target, outside)
        else:
            target = root.parent if to == ".." else root.joinpath(*to)
        path.symlink_to(target)


def walk(tree, above=()):
    for name, node in tree.items():
        yield (*above, name), node
        if isinstance(node, dict):
            yield from walk(node, (*above, name))


def is_hidden(path):
    return any(part[0] == "." or part in HIDDEN for part in path)


def listed(tree):
    """Pictures of every folder that a person sees, and why the tree may be refused."""
    folders: dict = {}
    reasons = set()
    for path, node in walk(tree):
        if is_hidden(path):
            continue
        if isinstance(node, Link) and isinstance(node.to, dict):
            folders[path] = list(node.to.values())
        elif isinstance(node, Link) and isinstance(node.to, tuple):
            if node.to != path[: len(node.to)]:  # not above itself: the same folder twice
                reasons.add("twin")
        elif node == NOWHERE:
            reasons.add("lead nowhere")
        elif (
            path[-1].lower().endswith(".png") and node not in (PIPE,) and not isinstance(node, dict)
        ):
            number = node.to if isinstance(node, Link) else node
            folders.setdefault(path[:-1], []).append(number)
    return folders, reasons


def person(tree):
    """Classes by name of the split (or "") and of the class, and why the tree may be refused."""
    folders, reasons = listed(tree)
    inside = ()
    while True:  # through a folder that holds all others
        below = {path[len(inside)] for path in folders if len(path) > len(inside)}
        deeper = [path for path in folders if len(path) > len(inside) + 1]
        if len(below) > 1 or not deeper or split_of(*below):
            break
        inside = (*inside, *below)
    classes = {path[len(inside) :]: of for path, of in folders.items() if len(path) > len(inside)}
    splits = {path[0]: split_of(path[0]) for path in classes}
    if any(splits.values()):
        if sorted(map(str, splits.values())) != ["test", "train", "val"]:
            return {}, reasons | {"splits"}
        classes = {(splits[p[0]], "/".join(p[1:])): of for p, of in classes.items() if p[1:]}
    else:
        classes = {("", "/".join(p)): of for p, of in classes.items()}
    for (split, name), of in classes.items():
        if len(of) < LEAST:
            inner = any(s == split and other.startswith(name + "/") for s, other in classes)
            reasons.add("lies beside class folders" if inner else "has 1 examples")
        if JUNK in of:
            reasons.add("cannot be read as an image")
    return classes, reasons


def split_of(name):
    return next((split for split, of in SPLIT_NAMES.items() if name in of), None)


SENTENCES = {"twin": "same folder by a link", "splits": "split"}


@settings(
    max_examples=TREES,
    deadline=None,
    derandomize=TREES == 30,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(trees())
def test_the_classes_that_a_person_would_list_or_one_sentence(tree):
    classes, reasons = person(tree)
    with contextlib.ExitStack() as stack:
        top = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("ADAPTAX_CACHE", str(top / "cache"))
        root, outside = top / "in" / "set", top / "outside"
        root.mkdir(parents=True)
        outside.mkdir()
        write(tree, root, outside)
        caught = stack.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("always")
        try:
            made, said = folder(root, **ASKED), ""
        except (ValueError, OSError) as error:
            made, said = None, str(error)
        event("refused" if said else "read")
        if made is None:
            assert "\n" not in said
            assert str(root) in said or "has 1 examples" in said
            assert any(SENTENCES.get(reason, reason) in said for reason in reasons), said
            return
        assert not reasons
        found: dict = {}
        for split in (made.train, made.val, made.test):
            bank, first = np.asarray(split.bank), 0
            for name, count in zip(split.classes, np.asarray(split.count)):
                whose = (split.split if ("train", name) in classes or ("val", name) in classes
                         or ("test", name) in classes else "", name)  # fmt: skip
                found[whose] = sorted(x.tobytes() for x in bank[first : first + count])
                first += count
        pictures = {n: np.random.default_rng(n).integers(0, 256, (SIDE, SIDE), np.uint8)
                    for of in classes.values() for n in of}  # fmt: skip
        pictures = {n: np.repeat(x[..., None], 3, -1).tobytes() for n, x in pictures.items()}
        expected = {key: sorted(pictures[n] for n in of) for key, of in classes.items()}
        assert found == expected
        held = [
            {x.tobytes() for x in np.asarray(s.bank)} for s in (made.train, made.val, made.test)
        ]
        shared = any(held[i] & held[j] for i in range(3) for j in range(i))
        assert ["two splits" in str(w.message) for w in caught] == [True] * shared
