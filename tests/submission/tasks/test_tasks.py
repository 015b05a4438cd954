"""Tasks: the evaluator's class order, prompts that can be understood, and task files of one's own, good and bad."""

import csv
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from submission.errors import UsageError
from submission.tasks import PromptStyle, Task, TaskClass, builtin_names, load_task, parse_prompts
from submission.tasks.task import DOMAINS
from tests.paths import SHARED

SHARED_DATA = SHARED / "data"
STYLES: tuple[PromptStyle, ...] = ("label", "described", "diverse")
CLIP_TOKENS = 77  # of a prompt, start and end included; what is beyond is cut off without a word

GOOD = """\
name = "pets"
size = 64
mean = [0.5, 0.5, 0.5]
std = [0.25, 0.25, 0.25]
max_ipc = 50
classes = [
  { index = 0, name = "house_cat", kind = "pet" },
  { index = 2, name = "owl", kind = "bird", label = "barn owl", described = "a photo of a barn owl in flight" },
  { index = 1, name = "dog", kind = "pet" },  # any order in the file
]
[phrasings]
pet = ["{}, on a sofa", "{}, in the garden"]
bird = ["{}, in a tree", "{} at dusk"]
"""

# The same task with a header a class: lines 6 to 8, 9 to 13 and 14 to 16.
GOOD_LONG = """\
name = "pets"
size = 64
mean = [0.5, 0.5, 0.5]
std = [0.25, 0.25, 0.25]
max_ipc = 50
[[classes]]
index = 0
name = "house_cat"
[[classes]]
index = 2
name = "owl"
label = "barn owl"
described = '''a photo of a barn owl in flight'''
[[ classes ]]
index = 1
name = "dog"
"""


def refusal(path: Path, text: str | bytes) -> str:
    """What load_task says to a file of that text, without the folder."""
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(UsageError) as caught:
        load_task(str(path))
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(str(path), path.name)


# The built-in tasks


@pytest.mark.parametrize("name", ["cifar100", "tinyimagenet"])
def test_the_class_order_is_the_evaluators(name: str) -> None:
    table = SHARED_DATA / name / "classes.tsv"
    if not table.exists():
        pytest.skip(f"{table} is not here")
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    classes = load_task(name).classes
    assert [c.index for c in classes] == [int(row["index"]) for row in rows]
    if name == "cifar100":
        assert [c.name for c in classes] == [row["name"] for row in rows]
    else:
        assert [c.wnid for c in classes] == [row["wnid"] for row in rows]
        assert [c.label for c in classes] == [row["words"] for row in rows]


def test_the_class_order_without_the_evaluators_table() -> None:
    cifar = load_task("cifar100").classes
    assert [c.name for c in cifar] == sorted(c.name for c in cifar)  # fine labels are numbered alphabetically
    assert len(cifar) == 100
    assert (cifar[0].name, cifar[52].name, cifar[99].name) == ("apple", "oak_tree", "worm")

    tiny = load_task("tinyimagenet").classes
    wnids = [c.wnid or "" for c in tiny]
    assert wnids == sorted(wnids)  # the folders of the data set, sorted
    assert all(re.fullmatch(r"n\d{8}", wnid) for wnid in wnids)
    assert len(set(wnids)) == len(tiny) == 200
    assert (tiny[0].name, tiny[95].wnid, tiny[199].name) == ("goldfish", "n03126707", "acorn")


@pytest.mark.parametrize("name", builtin_names())
def test_normalisation_size_and_cap(name: str) -> None:
    task = load_task(name)
    assert (task.size, task.mean, task.std, task.max_ipc) == {
        "cifar100": (32, (0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762), 500),
        "tinyimagenet": (64, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 500),
    }[name]
    assert task.name == name  # of the output file, which the evaluator looks for


@pytest.mark.parametrize("name", builtin_names())
def test_no_two_classes_share_a_prompt_in_any_round(name: str) -> None:
    task = load_task(name)
    for style in STYLES:
        for prompts in task.prompts(style):
            assert len(prompts) == len(set(prompts)) == len(task.classes)
    diverse = task.prompts("diverse")
    assert len(diverse) >= 6
    for one_class in zip(*diverse, strict=True):
        assert len(set(one_class)) == len(diverse)


@pytest.mark.parametrize("name", builtin_names())
def test_prompts_read_as_written_for_people(name: str) -> None:
    task = load_task(name)
    assert {c.kind for c in task.classes} == set(task.phrasings)  # no class without phrasings, no list unused
    for c in task.classes:
        assert re.fullmatch(r"a photo of [a-zA-Z' ,-]+", c.described), c
        assert len(c.described.split()) <= 20, c
        assert "_" not in c.label
        assert not re.search(r",\S", c.label + c.described), c  # the published prompts ran words together like that
        assert not re.search(r"\ba [aeio]|\ban [^aeiouhAEM]", c.described), c  # a/an
    for prompts in (p for style in STYLES for p in task.prompts(style)):
        for prompt in prompts:
            # A word may take two tokens, an uncommon one three; the diverse prompts, all common words, stay far away.
            assert 2 * len(prompt.split()) + prompt.count(",") <= CLIP_TOKENS - 2, prompt


HOMONYMS = {
    "cifar100": {
        "ray": "fish",
        "mouse": "rodent",
        "tank": "military",
        "orange": "fruit",
        "seal": "sea mammal",
        "plain": "grassland",
        "can": "drink",
        "keyboard": "computer",
        "rose": "flower",
        "cup": "drinking",
        "train": "railway",
        "whale": "ocean",
        "sweet_pepper": "bell pepper",
        "aquarium_fish": "fish tank",
        "willow_tree": "weeping willow",
        "poppy": "flower",
        "dinosaur": "model",
        "worm": "soft",
        "table": "four legs",
        "plate": "dinner plate",
    },
    "tinyimagenet": {
        "crane": "construction",
        "nail": "iron",
        "drumstick": "drum ",
        "reel": "fishing",
        "organ": "pipe",
        "chest": "lid",
        "brass": "plaque",
        "walking_stick": "insect",
        "beacon": "lighthouse",
        "bullet_train": "station",
        "beach_wagon": "station wagon",
        "projectile": "missile",
        "torch": "flame",
        "pole": "utility pole",
        "plate": "food",
        "fly": "housefly",
        "convertible": "car",
        "confectionery": "candy store",
        "alp": "mountain",
        "lesser_panda": "red panda",
        "Egyptian_cat": "Egyptian Mau",
        "plunger": "toilet",
        "chain": "links",
        "bow_tie": "wearing",
        "snorkel": "diving mask",
        "orange": "fruit",
        "monarch": "butterfly",
        "black_widow": "spider",
        "hog": "pig",
        "pop_bottle": "soda",
        "ice_lolly": "popsicle",
        "iPod": "music player",
        "gondola": "boat",
        "trilobite": "fossil",
        "academic_gown": "graduate",
        "dam": "river",
        "sock": "knitted",
    },
}


@pytest.mark.parametrize(("name", "words"), HOMONYMS.items())
def test_a_word_of_two_meanings_comes_with_the_one_the_data_set_shows(name: str, words: dict[str, str]) -> None:
    described = {c.name: c.described for c in load_task(name).classes}
    assert {c: described[c] for c, word in words.items() if word not in described[c]} == {}


# A task file of one's own


@pytest.mark.parametrize(
    "text", [GOOD, GOOD_LONG, "\ufeff" + GOOD.replace("\n", "\r\n")], ids=["inline", "headers", "windows"]
)
def test_a_task_file_of_ones_own(tmp_path: Path, text: str) -> None:
    (tmp_path / "my.toml").write_bytes(text.encode())
    task = load_task(str(tmp_path / "my.toml"))
    assert (task.title, task.size, task.std) == ("pets", 64, (0.25, 0.25, 0.25))
    assert [(c.index, c.name) for c in task.classes] == [(0, "house_cat"), (1, "dog"), (2, "owl")]
    assert task.prompts("label") == [["house cat", "dog", "barn owl"]]
    assert task.prompts("described") == [
        ["a photo of a house cat", "a photo of a dog", "a photo of a barn owl in flight"]
    ]


def test_diverse_prompts_take_the_phrasings_in_turn(tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text(GOOD)
    task = load_task(str(tmp_path / "my.toml"))
    assert task.phrased() == [
        [
            "a photo of a house cat, on a sofa",
            "a photo of a dog, on a sofa",
            "a photo of a barn owl in flight, in a tree",
        ],
        [
            "a photo of a house cat, in the garden",
            "a photo of a dog, in the garden",
            "a photo of a barn owl in flight at dusk",
        ],
    ]
    diverse = task.prompts("diverse")
    assert diverse[:2] == task.phrased() and len(diverse) == 2 * len(DOMAINS)
    assert diverse[2][0] == "a drawing of a house cat, on a sofa"
    assert diverse[-1][2] == "a sketch of a barn owl in flight at dusk"


def test_what_is_described_as_no_photo_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text(GOOD.replace("a photo of a barn owl", "an oil painting of a barn owl"))
    task = load_task(str(tmp_path / "my.toml"))
    assert task.prompts("diverse") == task.phrased()


def test_prompts_of_ones_own(tmp_path: Path) -> None:
    """Some classes may have more than others, in any order."""
    (tmp_path / "my.toml").write_text(GOOD)
    (tmp_path / "prompts.toml").write_text('owl = ["o"]\ndog = ["d1", "d2", "d3"]\nhouse_cat = ["c1", "c2"]\n')
    task = load_task(str(tmp_path / "my.toml"))
    task = replace(task, own_prompts=parse_prompts(tmp_path / "prompts.toml", task))
    assert task.prompts("own") == [["c1", "d1", "o"], ["c2", "d2", "o"], ["c1", "d3", "o"]]
    (tmp_path / "prompts.toml").write_text('house_cat = ["c"]\ndog = "d"\nowl = ["o"]\n')
    with pytest.raises(UsageError, match=r"prompts\.toml:2: dog must be a list of prompts"):
        parse_prompts(tmp_path / "prompts.toml", task)


def test_one_file_of_prompts_for_several_tasks(tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text(GOOD)
    (tmp_path / "other.toml").write_text(GOOD.replace('name = "owl"', 'name = "bee"'))
    (tmp_path / "prompts.toml").write_text('owl = ["o"]\ndog = ["d"]\nbee = ["b"]\nhouse_cat = ["c"]\n')
    tasks = [load_task(str(tmp_path / name)) for name in ("my.toml", "other.toml")]
    found = [parse_prompts(tmp_path / "prompts.toml", task, tasks) for task in tasks]
    assert [set(prompts) for prompts in found] == [{"house_cat", "dog", "owl"}, {"house_cat", "dog", "bee"}]
    with pytest.raises(UsageError, match=r"prompts\.toml:3: pets has no class 'bee'"):
        parse_prompts(tmp_path / "prompts.toml", tasks[0])


def test_diverse_prompts_without_phrasings_say_what_to_add(tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_text(GOOD_LONG)
    with pytest.raises(UsageError, match=r"pets has none: add a \[phrasings\] table"):
        load_task(str(path)).prompts("diverse")
    path.write_text(GOOD.replace('"dog", kind = "pet"', '"dog"'))
    with pytest.raises(UsageError, match="dog in task pets has none: add one of pet, bird"):
        load_task(str(path)).prompts("diverse")


@pytest.mark.parametrize("label", ["apple", "Owl"])
def test_the_default_prompt_has_its_article(tmp_path: Path, label: str) -> None:
    (tmp_path / "my.toml").write_text(GOOD_LONG.replace('"dog"', f'"{label}"'))
    assert load_task(str(tmp_path / "my.toml")).classes[1].described == f"a photo of an {label}"


def test_an_unknown_name_gets_the_closest_one_and_the_list() -> None:
    with pytest.raises(UsageError, match=r"no task is called 'cifar10' \(did you mean 'cifar100'\?\); .*tinyimagenet"):
        load_task("cifar10")
    with pytest.raises(UsageError, match=r"'mnist'; there are cifar100, tinyimagenet"):
        load_task("mnist")
    with pytest.raises(UsageError, match="no such file"):
        load_task("nowhere/my.toml")


# (what is changed in GOOD, into what, line, part of the message)
BAD_LINES = [
    ("size = 64", "size = = 64", 2, "not valid TOML"),
    ("{}, in a tree", '{}, in a tree", "{}', 13, "'bird' has 3 templates where 'pet' has 2"),
    ("size = 64", "size = 63", 2, "size must be an even whole number of pixels, 8 to 1024"),
    ("size = 64", "size = 6", 2, "size must be an even"),
    ("size = 64", "size = 2048", 2, "size must be an even"),
    ("size = 64", "size = 64.0", 2, "size must be an even"),
    ("size = 64", "size = true", 2, "size must be an even"),
    ("size = 64", "sise = 64", 2, "unknown key 'sise' (did you mean 'size'?)"),
    ("size = 64\n", "", 1, "key 'size' is missing from the task"),
    ("name = \"pets\"", "name = \"../pets\"", 1, "name must suit as a file name"),
    ("name = \"pets\"", "name = \"\"", 1, "name must suit as a file name"),
    ("name = \"pets\"", "name = \".pets\"", 1, "name must suit as a file name"),
    ("name = \"pets\"", "name = 3", 1, "name must suit as a file name"),
    ("name = \"pets\"", "name = \"pets\"\ntitle = 'P\\a'\ntitle2 = 0", 3, "unknown key 'title2'"),
    ("name = \"pets\"", "name = \"pets\"\ntitle = \"P\\n\"", 2, "title must be a string of one line"),
    ("mean = [0.5, 0.5, 0.5]", "mean = [0.5, 0.5]", 3, "mean must be three numbers"),
    ("mean = [0.5, 0.5, 0.5]", "mean = 0.5", 3, "mean must be three numbers"),
    ("mean = [0.5, 0.5, 0.5]", "mean = [0.5, nan, 0.5]", 3, "mean must be three numbers"),
    ("mean = [0.5, 0.5, 0.5]", "mean = [0.5, true, 0.5]", 3, "mean must be three numbers"),
    ("mean = [0.5, 0.5, 0.5]", f"mean = [0.5, 1{400 * '0'}, 0.5]", 3, "mean must be three numbers"),
    ("mean = [0.5, 0.5, 0.5]", "mean = [129.3, 124.1, 112.4]", 3, "not 0..255"),
    ("std = [0.25, 0.25, 0.25]", "std = [0.25, 0, 0.25]", 4, "std must be three numbers above 0"),
    ("std = [0.25, 0.25, 0.25]", "std = [0.25, 1e-300, 0.25]", 4, "std must be three numbers above 0"),
    ("std = [0.25, 0.25, 0.25]", "std = [0.25, -0.1, 0.25]", 4, "std must be three numbers above 0"),
    ("std = [0.25, 0.25, 0.25]", "std = [0.25, inf, 0.25]", 4, "std must be three numbers above 0"),
    ("std = [0.25, 0.25, 0.25]", "std = ['a', 'b', 'c']", 4, "std must be three numbers above 0"),
    ("max_ipc = 50", "max_ipc = 0", 5, "max_ipc must be a whole number, 1 or more"),
    ("max_ipc = 50", "max_ipc = '50'", 5, "max_ipc must be a whole number, 1 or more"),
    ("index = 1,", "index = 2,", 9, "class index 2 is used twice (first on line 8)"),
    ("index = 1,", "index = 3,", 8, "class index 1 is missing (the next one there is, 2, is here)"),
    ("index = 0,", "index = 3,", 9, "class index 0 is missing (the next one there is, 1, is here)"),
    ("index = 1,", "index = -1,", 9, "index must be a whole number, 0 or more"),
    ("index = 1,", "index = '1',", 9, "index must be a whole number, 0 or more"),
    ("index = 1,", "", 9, "key 'index' is missing from this class"),
    ('name = "dog", ', "", 9, "key 'name' is missing from this class"),
    ('"dog"', '"house_cat"', 9, "class name 'house_cat' is used twice (first on line 7)"),
    ('"dog"', '"dog", described = "a photo of a house cat"', 9, "is used twice (first on line 7)"),
    ('"dog"', '"dog", described = "A photo of a House Cat"', 9, "is used twice (first on line 7)"),
    ('"dog"', '"dog", described = ""', 9, "described must be a string of one line, not empty"),
    ('"dog"', '"dog", described = "  "', 9, "described must be a string of one line, not empty"),
    ('"dog"', '"dog", described = ["a dog"]', 9, "described must be a string of one line, not empty"),
    ('"dog"', '"dog", label = 7', 9, "label must be a string of one line, not empty"),
    ('"dog"', '"dog", prompt = "a dog"', 9, "unknown key 'prompt'"),
    ('"house_cat"', '"house_cat", extra = { a = 1 }', 7, "unknown key 'extra'"),
    ('"dog", kind = "pet"', '"dog", kind = "pets"', 9, "class 'dog' is of kind 'pets', and [phrasings] has no"),
    ("{}, in a tree", "in a tree", 13, "phrasings 'bird' must be a list of strings, each with exactly one {}"),
    ("{}, in a tree", "{}, beside {}", 13, "phrasings 'bird' must be a list of strings, each with exactly one {}"),
    ('["{}, in a tree", "{} at dusk"]', "[]", 13, "phrasings 'bird' must be a list"),
    ('["{}, in a tree", "{} at dusk"]', '"{}, in a tree"', 13, "phrasings 'bird' must be a list"),
    ("[phrasings]\n", "", 11, "unknown key 'pet'"),
    ("[phrasings]", "[[phrasings]]", 11, "phrasings must be a table"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "line", "says"), BAD_LINES)
def test_a_bad_file_is_refused_naming_the_line(tmp_path: Path, old: str, new: str, line: int, says: str) -> None:
    assert GOOD.count(old) == 1
    message = refusal(tmp_path / "my.toml", GOOD.replace(old, new))
    assert message.startswith(f"my.toml:{line}: ")
    assert says in message


@pytest.mark.parametrize(
    ("old", "new", "line", "says"),
    [
        ("index = 1\n", "index = 2\n", 14, "class index 2 is used twice (first on line 9)"),
        ("index = 1\n", "index = 3\n", 9, "class index 1 is missing"),
        ("index = 1\n", "\n", 14, "key 'index' is missing from this class"),
        ('name = "dog"', 'name = ""', 16, "name must be a string"),
        ('name = "dog"', '"name" = ""', 16, "name must be a string"),
        ('label = "barn owl"', "lable = 1", 12, "unknown key 'lable' (did you mean 'label'?)"),
        ("'''a photo of a barn owl in flight'''", "''", 13, "described must be a string"),
        ("'''a photo of a barn owl in flight'''", "'''\n[[classes]]\nindex = 7'''", 13, "described must be a string"),
        ('"barn owl"', '"barn \\" # owl"  # [[classes]]\nwnid = 0', 13, "wnid must be a string"),
        ('name = "owl"', 'name = "owl"\nkind = "bird"', 9, "'owl' is of kind 'bird'"),
        ("max_ipc = 50", "max_ipc = 50\nclasses = 3", 7, "not valid TOML"),
    ],
)
def test_lines_are_found_with_a_header_a_class_as_well(
    tmp_path: Path, old: str, new: str, line: int, says: str
) -> None:
    assert GOOD_LONG.count(old) == 1
    message = refusal(tmp_path / "my.toml", GOOD_LONG.replace(old, new))
    assert message.startswith(f"my.toml:{line}: ")
    assert says in message


HEAD = GOOD_LONG[: GOOD_LONG.index("[[classes]]")]


@pytest.mark.parametrize(
    ("text", "starts"),
    [
        ("", "my.toml:1: key 'name' is missing"),
        ("name = 'x\n", "my.toml:1: not valid TOML"),
        ("name = [\n1,\n2,\n", "my.toml:3: not valid TOML"),  # "at end of document"
        ("x = " + "[" * 100_000, "my.toml:1: not a task file: nested too deeply"),
        (b"name = 'x'\nsize = 64 # caf\xe9\n", "my.toml:2: not UTF-8 text (byte 0xe9)"),
        (b"\x89PNG\r\n\x1a\n\0", "my.toml:1: not UTF-8 text"),
        ("#" * (4 * 2**20 + 1), "my.toml: 4.00 MiB is too much"),
        (HEAD + "classes = 3", "my.toml:6: classes must be a list of two or more tables"),
        (HEAD + "classes = ['cat', 'dog']", "my.toml:6: classes must be a list of two or more tables"),
        (HEAD + "classes = []", "my.toml:6: classes must be a list of two or more tables"),
        (HEAD + "\n[[classes]]\nindex = 0\nname = 'cat'", "my.toml:7: classes must be a list of two or more tables"),
        (HEAD + "\n[classes]\nindex = 0\nname = 'cat'", "my.toml:7: classes must be a list of two or more tables"),
        (HEAD + "classes = [{index=0,name='a'}, {index=1,name='{'},\n{index=1,name='b'}]", "my.toml:7: class index 1"),
    ],
)  # fmt: skip
def test_other_bad_files(tmp_path: Path, text: str | bytes, starts: str) -> None:
    assert refusal(tmp_path / "my.toml", text).startswith(starts)


def test_a_folder_or_a_pipe_is_no_task_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        load_task(str(tmp_path / "my.toml"))
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(UsageError, match="not a file"):
        load_task(str(tmp_path / "folder.toml"))


printable = st.characters(exclude_categories=("C", "Z"), include_characters=" ")
words = st.text(printable, min_size=1, max_size=30).filter(lambda s: bool(s.strip()))
names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", fullmatch=True)
unit = st.floats(min_value=0, max_value=1)


@st.composite
def tasks(draw: st.DrawFn) -> Task:
    kinds = draw(st.lists(words, max_size=3, unique=True))
    phrasing_count = draw(st.integers(1, 3))
    template = st.tuples(words, words).map(lambda p: f"{p[0].replace('{}', '')}{{}}{p[1].replace('{}', '')}")
    templates = st.lists(
        template.filter(lambda t: t.count("{}") == 1), min_size=phrasing_count, max_size=phrasing_count
    ).map(tuple)
    of_class = draw(
        st.lists(st.tuples(words, words, words), min_size=2, max_size=6, unique_by=(lambda t: t[0], lambda t: t[2]))
    )
    classes = tuple(
        TaskClass(i, *text, draw(st.sampled_from([*kinds, None])), draw(st.none() | words))
        for i, text in enumerate(of_class)
    )
    return Task(
        name=draw(names),
        title=draw(words),
        size=2 * draw(st.integers(4, 512)),
        mean=draw(st.tuples(unit, unit, unit)),
        std=draw(st.tuples(*[st.floats(min_value=1e-4, max_value=1)] * 3)),
        max_ipc=draw(st.integers(1, 10**6)),
        classes=classes,
        phrasings={kind: draw(templates) for kind in kinds},
    )


def toml_value(value: Any) -> str:
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, tuple):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    return repr(value)


def toml_of(task: Task, one_line_a_class: bool) -> str:
    top = ("name", "title", "size", "mean", "std", "max_ipc")
    lines = [f"{key} = {toml_value(getattr(task, key))}" for key in top]
    tables = [[f"{k} = {toml_value(v)}" for k, v in vars(c).items() if v is not None] for c in task.classes]
    if one_line_a_class:
        lines += ["classes = [", *(f"  {{ {', '.join(table)} }}," for table in reversed(tables)), "]"]
    lines += ["[phrasings]", *(f"{toml_value(kind)} = {toml_value(t)}" for kind, t in task.phrasings.items())]
    if not one_line_a_class:
        lines += [line for table in tables for line in ("[[classes]]", *table)]
    return "\n".join(lines) + "\n"


@settings(max_examples=60)
@given(task=tasks(), one_line_a_class=st.booleans())
def test_any_task_survives_being_written_and_read(
    tmp_path_factory: pytest.TempPathFactory, task: Task, one_line_a_class: bool
) -> None:
    path = tmp_path_factory.mktemp("task") / "my.toml"
    path.write_text(toml_of(task, one_line_a_class), encoding="utf-8", newline="")
    assert load_task(str(path)) == task


@settings(max_examples=60)
@given(task=tasks(), one_line_a_class=st.booleans(), data=st.data())
def test_a_second_use_of_an_index_is_found_whatever_the_strings_hold(
    tmp_path_factory: pytest.TempPathFactory, task: Task, one_line_a_class: bool, data: st.DataObject
) -> None:
    lines = toml_of(task, one_line_a_class).split("\n")
    starts = [i for i, line in enumerate(lines) if line.startswith(("  { index", "index"))]
    first, second = sorted(data.draw(st.lists(st.sampled_from(starts), min_size=2, max_size=2, unique=True)))
    index = re.search(r"index = (\d+)", lines[first])
    assert index
    lines[second] = re.sub(r"index = \d+", index[0], lines[second], count=1)
    header = 0 if one_line_a_class else 1  # [[classes]] is the line before
    message = refusal(tmp_path_factory.mktemp("task") / "my.toml", "\n".join(lines))
    assert message == (
        f"my.toml:{second + 1 - header}: class index {index[1]} is used twice (first on line {first + 1 - header})"
    )
