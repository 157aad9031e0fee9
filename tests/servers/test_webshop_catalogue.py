"""Catalogues from files: small ones in memory, large ones from the cache folder."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import shutil
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from env_servers.webshop import files, loading
from env_servers.webshop.episode import Episode
from env_servers.webshop.generator import generate_shop
from env_servers.webshop.products import ShopDataError
from env_servers.webshop.settings import ShopSettings
from env_servers.webshop.shop import Shop

SHOP = generate_shop(seed=3, products=40)
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes the files of a shop into a folder of its own."""

    def write_files(items: Any = SHOP.items, instructions: Any = SHOP.instructions) -> Path:
        folder = tmp_path / "data"
        folder.mkdir(exist_ok=True)
        (folder / "items_shuffle.json").write_text(json.dumps(items))
        (folder / "items_ins_v2.json").write_text(json.dumps(instructions))
        return folder

    return write_files


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Every catalogue counts as large and is stored below this folder."""
    monkeypatch.setenv("ATOD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(loading, "STORED_FROM", 0)
    return tmp_path / "cache" / "webshop"


def open_shop(folder: Path, **settings: Any) -> Shop:
    return Shop.open(ShopSettings(data=str(folder), noun_tagger="words", **settings))


def walk(shop: Shop) -> list[str]:
    """Texts of a short visit."""
    goal = shop.goals[5]
    episode = Episode(shop, goal, "5")
    actions = [f"search[{goal.query}]", f"click[{goal.asin}]"]
    actions += [f"click[{value}]" for _, value in goal.options]
    actions += ["click[features]", "click[< prev]", "click[buy now]"]
    return [episode.step(action).page.text for action in actions]


def test_a_stored_catalogue_is_the_same_shop(
    write: Write, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write()
    stored = open_shop(folder)
    assert (cache / os.listdir(cache)[0] / "goals-233").is_dir()
    monkeypatch.setattr(loading, "STORED_FROM", 1 << 30)
    in_memory = open_shop(folder)
    assert list(stored.catalogue) == list(in_memory.catalogue)
    assert list(stored.goals) == list(in_memory.goals)
    assert stored.label == in_memory.label == str(folder)
    assert stored.content_hash == in_memory.content_hash
    assert stored.name == f"webshop/custom-40-{stored.content_hash[:8]}"
    for split in stored.splits:
        assert stored.manifest(split) == in_memory.manifest(split)
    for keywords in ("steel", "<c> garden", "<q> x", f"<q> {stored.goals[0].query}"):
        assert stored.search_rows(keywords, "") == in_memory.search_rows(keywords, "")
    assert walk(stored) == walk(in_memory)


def test_the_second_start_reads_no_source(
    write: Write, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write()
    first = open_shop(folder)

    def fail(*_: object) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(files, "open_text", fail)
    monkeypatch.setattr("env_servers.webshop.shop.draw_synthetic", fail)
    assert list(open_shop(folder).goals) == list(first.goals)
    assert len(os.listdir(cache)) == 1


def test_lone_surrogates_are_replaced_everywhere(
    write: Write, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asin = SHOP.items[0]["asin"]
    entry = {
        "attributes": ["a\ud800"],
        "instruction": "b\udfff",
        "instruction_attributes": ["c\ud800"],
    }
    items = [{**SHOP.items[0], "name": "d\ud800 e"}, *SHOP.items[1:]]
    folder = write(items, {**SHOP.instructions, asin: entry})
    for least in (0, 1 << 30):
        monkeypatch.setattr(loading, "STORED_FROM", least)
        catalogue = open_shop(folder).catalogue
        assert (catalogue[0].title, catalogue[0].attributes) == ("d\ufffd e", ("a\ufffd",))
        instruction = catalogue.instruction(0)
        assert instruction is not None
        assert (instruction.text, instruction.attributes) == ("b\ufffd", ("c\ufffd",))


def test_asins_that_differ_in_lone_surrogates_only_are_one_product(write: Write) -> None:
    first, *rest = SHOP.items
    twins = [{**first, "asin": "B\ud800"}, {**first, "asin": "B\udfff"}]
    catalogue = open_shop(write([*twins, *rest])).catalogue
    assert [p.asin for p in catalogue] == ["B\ufffd", *(item["asin"] for item in rest)]
    assert catalogue.columns.find(rest[0]["asin"]) == 1


def test_changed_files_are_stored_again(write: Write, cache: Path) -> None:
    open_shop(write())
    changed = open_shop(write(SHOP.items[:20]))
    assert len(changed.catalogue) == 20
    assert len(os.listdir(cache)) == 2


def test_a_failed_start_leaves_nothing_behind(write: Write, cache: Path) -> None:
    broken = [*SHOP.items[:30], {**SHOP.items[30], "pricing": "free"}]
    with pytest.raises(ShopDataError, match="entry 30"):
        open_shop(write(broken))
    assert {path.suffix for path in cache.iterdir()} == {".lock"}


def test_starts_at_the_same_time_store_one_catalogue(
    write: Write, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored, store, folder = [], loading._store, write()

    def counted(*arguments: Any) -> None:
        stored.append(arguments)
        store(*arguments)

    monkeypatch.setattr(loading, "_store", counted)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: walk(open_shop(folder)), range(3)))
    assert found[0] == found[1] == found[2]
    assert (len(stored), len(os.listdir(cache))) == (1, 1)


@pytest.mark.parametrize(
    "name",
    [
        "records.jsonl",
        "starts.npy",
        "asins.npy",
        "goals-233/order.npy",
        "index/docs.npy",
        "hashes.json",
    ],
)
def test_damaged_stored_files_are_named(write: Write, cache: Path, name: str) -> None:
    folder = write()
    open_shop(folder)
    (stored,) = cache.iterdir()
    path = stored / name
    path.write_bytes(path.read_bytes()[:90])
    with pytest.raises(ShopDataError, match=f"Cannot use {stored}.*Delete this folder"):
        open_shop(folder)


def test_a_full_disk_is_explained(
    write: Write, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(sqlite3, "connect", full)
    with pytest.raises(ShopDataError, match=r"disk is full.*ATOD_CACHE"):
        open_shop(write())
    assert {path.suffix for path in cache.iterdir()} == {".lock"}


@pytest.mark.usefixtures("cache")
def test_a_cache_folder_that_cannot_be_written(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ATOD_CACHE", str(tmp_path / "file"))
    with pytest.raises(ShopDataError, match="ATOD_CACHE"):
        open_shop(write())


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".xz", lzma.compress)])
@pytest.mark.parametrize("number", ["", "_1000"])
def test_compressed_files(
    write: Write, number: str, suffix: str, pack: Callable[[bytes], bytes]
) -> None:
    folder = write()
    expected = list(open_shop(folder).goals)
    for name in ("items_shuffle", "items_ins_v2"):
        plain = folder / f"{name}.json"
        (folder / f"{name}{number}.json{suffix}").write_bytes(pack(plain.read_bytes()))
        plain.unlink()
    assert list(open_shop(folder).goals) == expected


@pytest.mark.parametrize(
    "name", ["items_shuffle_1000 (1)", "items_shuffle_1000_old", "items_shuffle (1)"]
)
def test_files_with_other_names_are_not_played(write: Write, name: str) -> None:
    folder = write()
    expected = open_shop(folder)
    (folder / f"{name}.json").write_text(json.dumps(SHOP.items[:5]))
    (folder / name.replace("shuffle", "ins_v2")).with_suffix(".json").write_text("{}")
    shop = open_shop(folder)
    assert (shop.name, shop.content_hash) == (expected.name, expected.content_hash)
    (folder / "items_shuffle.json").unlink()
    with pytest.raises(ShopDataError, match="has no items_shuffle_1000"):
        open_shop(folder)


def test_tasks_of_two_folders_have_different_ids(write: Write) -> None:
    first = open_shop(write(SHOP.items[:20])).task_ids("train")
    second = open_shop(write(SHOP.items[20:])).task_ids("train")
    assert not {*first} & {*second}


def test_entries_that_the_original_leaves_out(write: Write) -> None:
    first, second, *_ = SHOP.items
    extra = [{**second, "asin": "nan"}, {**second, "asin": "B0123456789"}, {**first, "name": "x"}]
    shop = open_shop(write([first, *extra, second]))
    assert [product.asin for product in shop.catalogue] == [first["asin"], second["asin"]]
    assert shop.catalogue[0].title == first["name"]
    assert shop.catalogue.columns.find(second["asin"]) == 1
    assert shop.catalogue.columns.find("B000000000") is None


@pytest.mark.parametrize(
    ("items", "instructions", "said"),
    [
        ([], {}, "contains no product"),
        ({"a": 1}, {}, r"expected '\['"),
        ([1], {}, "entry 0 is not an object"),
        ([{"name": "x"}], {}, "entry 0 has no 'asin'"),
        ([{"asin": "B\0"}], {}, "entry 0 has no 'asin'"),
        ([{"asin": "B1"}], {}, r"entry 0 \(B1\): 'name'"),
        (SHOP.items, [], r"expected '{'"),
        (SHOP.items, {"B1": []}, "'B1' is not an object"),
        (SHOP.items, {}, "0 goals"),
    ],
)
def test_wrong_shapes(write: Write, items: Any, instructions: Any, said: str) -> None:
    with pytest.raises(ShopDataError, match=said) as caught:
        open_shop(write(items, instructions))
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize("keep", [0, 1, 2, 500, -3, -1])
def test_truncated_files(write: Write, keep: int) -> None:
    folder = write()
    path = folder / "items_shuffle.json"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ShopDataError, match="items_shuffle"):
        open_shop(folder)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[" * 100_000, b"[{}] x", b"[{},]", b"[{} {}]"])
def test_files_that_are_no_json(write: Write, content: bytes) -> None:
    folder = write()
    (folder / "items_shuffle.json").write_bytes(content)
    with pytest.raises(ShopDataError, match="items_shuffle"):
        open_shop(folder)


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".xz", lzma.compress)])
def test_truncated_archives(write: Write, suffix: str, pack: Callable[[bytes], bytes]) -> None:
    folder = write()
    plain = folder / "items_shuffle.json"
    packed = pack(plain.read_bytes())
    plain.unlink()
    for content in (packed[: len(packed) // 2], b"not packed"):
        (folder / f"items_shuffle.json{suffix}").write_bytes(content)
        with pytest.raises(ShopDataError, match="items_shuffle"):
            open_shop(folder)


def test_missing_files(write: Write, tmp_path: Path) -> None:
    with pytest.raises(ShopDataError, match="There is no folder"):
        open_shop(tmp_path / "nowhere")
    with pytest.raises(ShopDataError, match="There is no folder ~unknown-user/shop"):
        open_shop(Path("~unknown-user/shop"))
    folder = write()
    with pytest.raises(ShopDataError, match="items_human_ins"):
        open_shop(folder, human_goals=True)
    (folder / "items_ins_v2.json").unlink()
    with pytest.raises(ShopDataError, match="items_ins_v2"):
        open_shop(folder)
    shutil.rmtree(folder)
    folder.mkdir()
    with pytest.raises(ShopDataError, match="items_shuffle_1000"):
        open_shop(folder)


def test_human_instructions_of_other_products(write: Write) -> None:
    folder = write()
    entry = {"instruction": "a.", "instruction_attributes": ["b"], "instruction_options": []}
    path = folder / "items_human_ins.json"
    path.write_text(json.dumps({"B000000000": [entry]}))
    with pytest.raises(ShopDataError, match="not from the same set"):
        open_shop(folder, human_goals=True)
    path.write_text(json.dumps({SHOP.items[0]["asin"]: [entry, {**entry, "instruction": 1}]}))
    with pytest.raises(ShopDataError, match="items_human_ins"):
        open_shop(folder, human_goals=True)
    with pytest.raises(ShopDataError, match="human_goals=False"):
        Shop.open(ShopSettings(human_goals=True))


def test_entries_across_the_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = [{"text": "\u00e9\U0001f600" * 20, "n": n} for n in range(30)]
    path = tmp_path / "x.json"
    path.write_text(json.dumps(values, ensure_ascii=False, indent=1), encoding="utf-8")
    for chunk in (1, 2, 3, 7, 64, 1000):
        monkeypatch.setattr(files, "_CHUNK", chunk)
        assert list(files.read_array(path)) == values
    path.write_text('{"a": 12, "b": [1.5, null], "c": "x"}')
    monkeypatch.setattr(files, "_CHUNK", 1)
    assert dict(files.read_object(path)) == {"a": 12, "b": [1.5, None], "c": "x"}


def test_an_endless_entry_is_not_read_into_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_CHUNK", 100)
    monkeypatch.setattr(files, "_LARGEST_ENTRY", 1000)
    path = tmp_path / "x.json"
    path.write_text('["' + "x" * 100_000)
    with pytest.raises(ShopDataError, match="at character 1"):
        list(files.read_array(path))


def official_copy(webshop_data: Path, folder: Path) -> tuple[list[Any], dict[str, Any]]:
    """The official small set as JSON values, and its files in a folder that may be changed."""
    names = ("items_shuffle_1000.json", "items_ins_v2_1000.json", "items_human_ins.json")
    items = json.loads(lzma.decompress((webshop_data / f"{names[0]}.xz").read_bytes()))
    shutil.copy(webshop_data / names[1], folder)
    (folder / names[1]).chmod(0o600)
    shutil.copy(webshop_data / "items_human_ins_subset13.json", folder / names[2])
    (folder / names[2]).chmod(0o600)
    return items, json.loads((folder / names[1]).read_text())


def test_a_folder_called_official_is_not_the_official_data(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write()
    monkeypatch.chdir(folder.rename(folder.parent / "official").parent)
    shop = open_shop(Path("official"))
    assert (shop.label, shop.name) == ("./official", f"webshop/custom-40-{shop.content_hash[:8]}")
    assert 0 < len(shop.splits["test"]) == len(shop.goals) // 10


@pytest.mark.slow
def test_only_the_published_content_is_official(webshop_data: Path, tmp_path: Path) -> None:
    items, instructions = official_copy(webshop_data, tmp_path)
    place = next(
        i for i, item in enumerate(items) if any((item["customization_options"] or {}).values())
    )
    asin = items[place]["asin"]

    def label(item: dict[str, Any] | None = None, entry: dict[str, Any] | None = None) -> str:
        changed = [*items]
        changed[place] = {**items[place], **(item or {})}
        (tmp_path / "items_shuffle_1000.json").write_text(json.dumps(changed))
        (tmp_path / "items_ins_v2_1000.json").write_text(
            json.dumps({**instructions, asin: {**instructions[asin], **(entry or {})}})
        )
        shop = open_shop(tmp_path)
        assert shop.folder == tmp_path
        assert shop.name.startswith("webshop/official" if shop.label == "official" else "webshop/c")
        return shop.label

    # Written again, with fields that no page shows: the same content.
    assert label({"page": 17}) == "official"
    option = json.loads(json.dumps(items[place]["customization_options"]))
    name = next(name for name in option if option[name])
    option[name][0]["value"] += " x"
    changes: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"name": "Easier to find"}, {}), ({"pricing": "$1.00"}, {}), ({"query": "x"}, {}),
        ({"full_description": "x"}, {}), ({"small_description": ["x"]}, {}),
        ({"product_category": "x"}, {}), ({"category": "x"}, {}),
        ({"customization_options": option}, {}), ({"asin": "B000000000"}, {}),
        ({}, {"attributes": ["x"]}),
        ({}, {"instruction": "x", "instruction_attributes": ["x"]}),
    ]  # fmt: skip
    for item, entry in changes:
        assert label(item, entry) == str(tmp_path), (item, entry)
    (tmp_path / "items_shuffle_1000.json").write_text(
        json.dumps([*items, {**items[0], "asin": "B1"}])
    )
    assert open_shop(tmp_path).label == str(tmp_path)


@pytest.mark.slow
def test_human_goals_are_official_by_their_content(webshop_data: Path, tmp_path: Path) -> None:
    items, _ = official_copy(webshop_data, tmp_path)
    (tmp_path / "items_shuffle_1000.json").write_text(json.dumps(items))
    shop = open_shop(tmp_path, human_goals=True)
    assert (shop.label, shop.name) == ("official", "webshop/official-1000-human")
    assert shop.content_hash != open_shop(tmp_path).content_hash
    path = tmp_path / "items_human_ins.json"
    path.write_text(path.read_text().replace("rubber sole", "leather sole"))
    changed = open_shop(tmp_path, human_goals=True)
    assert changed.label == str(tmp_path)
    assert changed.content_hash != shop.content_hash
    assert open_shop(tmp_path).label == "official"


def test_published_files_are_official_by_their_bytes(
    write: Write, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write()
    assert open_shop(folder).label == str(folder)
    noted = json.loads((cache / os.listdir(cache)[0] / "hashes.json").read_text())
    plain = [
        files.content_sha256(folder / name) for name in ("items_shuffle.json", "items_ins_v2.json")
    ]
    assert noted["files"] == plain
    monkeypatch.setattr(loading, "_PUBLISHED_FILES", {tuple(plain)})
    assert open_shop(folder).label == "official"
    packed = folder / "items_shuffle.json"
    (folder / "items_shuffle.json.xz").write_bytes(lzma.compress(packed.read_bytes()))
    packed.unlink()
    assert open_shop(folder).label == "official"
