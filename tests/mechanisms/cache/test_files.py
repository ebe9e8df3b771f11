"""Stores in files: what comes back is what was saved, and nothing damaged comes back."""

from __future__ import annotations

import json
import random
import resource
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from saccade.mechanisms.cache._derived import Derived
from saccade.mechanisms.cache.attention import CachedAttention
from saccade.mechanisms.cache.base import CachePolicy, Everything, compose
from saccade.mechanisms.cache.chai import Chai
from saccade.mechanisms.cache.files import CacheFile, CacheFileError, _digest, save_stores
from saccade.mechanisms.cache.h2o import H2O
from saccade.mechanisms.cache.instinfer import InstInfer
from saccade.mechanisms.cache.kivi import Kivi
from saccade.mechanisms.cache.lamina import Lamina
from saccade.mechanisms.cache.loki import Loki
from saccade.mechanisms.cache.recycled import Recycled
from saccade.mechanisms.cache.retrieval_attention import RetrievalAttention
from saccade.mechanisms.cache.sink_recent import SinkRecent
from saccade.mechanisms.cache.storage import Storage
from saccade.mechanisms.cache.store import KVStore
from saccade.mechanisms.cache.tiers import Disk
from saccade.mechanisms.cache.token_select import TokenSelect
from saccade.mechanisms.cache.vattention import VAttention
from saccade.mechanisms.cache.zipcache import ZipCache

safetensors = pytest.importorskip("safetensors.torch")

POLICIES = {
    "evicted": compose(keep=H2O(heavy=4, recent=4), store=Storage(page=8)),
    "bits=4": compose(store=Storage(bits=4, normalise=True)),
    "bits=2": compose(keep=SinkRecent(sinks=2, recent=7), store=Storage(bits=2)),
    "dtype": compose(store=Storage(dtype=torch.bfloat16)),
    "kivi": Kivi(bits=2, group=4, recent=8, channels=None),
    "zipcache": ZipCache(block=10),
    "chai": Chai(heads=0.5),
    "chai, waiting": Chai(heads=0.5, warmup=60),
    "vattention": VAttention(tokens=512),
    "lamina": Lamina(bits=8, threads=1),
    "instinfer": InstInfer(resident=0.5),
    "recycled": Recycled(tokens=8, stride=3, similarity=None, kernel=3),
    "retrieval": RetrievalAttention(tokens=6, sinks=2, local=4, width=8, samples=16, degree=4, expand=2),
    "token_select": TokenSelect(tokens=8, sinks=2, local=4, similarity=-1.0),
    "loki": Loki(tokens=8, dims=4),
}  # fmt: skip


def tokens(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, heads, count, 8, generator=generator) for heads in (4, 4, 4))


def fed(policy: CachePolicy, *, padded: bool = True, **options: Any) -> CachedAttention:
    """A layer that has seen a prompt, one row of it padded, and 13 tokens."""
    layer, present = CachedAttention(policy, **options), torch.ones(2, 30, dtype=torch.bool)
    present[1, :7] = not padded
    layer(*tokens(30, 0), present=present)
    for number in range(1, 14):
        layer(*tokens(1, number))
    return layer


def steps(layer: CachedAttention) -> Tensor:
    return torch.cat([layer(*tokens(1, number)) for number in range(50, 58)], 2)


@cache
def file_of(name: str, folder: Path) -> Path:
    """A file with one layer of that policy's."""
    path = folder / f"{name}.safetensors"
    save_stores(path, [(POLICIES[name], fed(POLICIES[name]).kept)], {"model": "toy"})
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("caches")


def opened(path: Path, policy: CachePolicy) -> KVStore:
    store = policy.store()
    CacheFile.read(path).fill([(policy, store)])
    return store


def forged(path: Path, change: Callable[[list[dict], dict[str, Tensor]], Any], into: Path) -> Path:
    """The same file with another content, whose digest is right."""
    with safetensors.safe_open(path, framework="pt") as file:
        header, found = file.metadata(), {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    layers = json.loads(header["layers"])
    change(layers, found)
    header["layers"] = json.dumps(layers)
    header["digest"] = _digest(header, found)
    safetensors.save_file({name: x.contiguous() for name, x in found.items()}, into, metadata=header)
    return into


@pytest.mark.parametrize("name", POLICIES)
def test_what_comes_back_is_what_was_saved_and_goes_on_alike(name: str, tmp_path: Path) -> None:
    policy, path = POLICIES[name], tmp_path / "cache.safetensors"
    layer, again = fed(policy), CachedAttention(policy)
    save_stores(path, [(policy, layer.kept), (policy, policy.store())], {"model": "toy"})
    assert [path.name for path in tmp_path.iterdir()] == ["cache.safetensors"]
    file, empty = CacheFile.read(path), policy.store()
    assert file.about == {"model": "toy"}
    file.fill([(policy, again.kept), (policy, empty)])
    old, new = layer.kept, again.kept
    assert empty.empty
    assert type(new) is type(old)
    assert (new.storage, new.stats, new.ordered) == (old.storage, old.stats, old.ordered)
    assert new.nbytes <= old.nbytes
    for part in ("lengths", "seen", "positions"):
        assert torch.equal(getattr(new, part), getattr(old, part))
    if "in" not in name:  # keys of another process do not come here
        assert torch.equal(new.keys, old.keys)
        assert torch.equal(new.values, old.values)
    for stat in old.stats:
        assert torch.equal(new.stat(stat), old.stat(stat))
    assert new.derived.keys() == old.derived.keys()
    assert torch.equal(steps(again), steps(layer))


@pytest.mark.parametrize("name", ["evicted", "bits=4", "recycled"])
def test_a_tier_makes_no_difference_to_a_file(name: str, tmp_path: Path) -> None:
    policy, path = POLICIES[name], tmp_path / "cache.safetensors"
    layers = [fed(policy, tier=Disk(tmp_path, resident=0.2)), CachedAttention(policy)]
    save_stores(path, [(policy, layers[0].kept)], {})
    layers.append(CachedAttention(policy, tier=Disk(tmp_path, resident=0.2)))
    for layer in layers[1:]:
        CacheFile.read(path).fill([(policy, layer.kept)])
    first, *others = (steps(layer) for layer in layers)
    assert torch.allclose(first, others[0], atol=1e-6)  # attention by stretches rounds otherwise
    assert torch.equal(first, others[1])


def test_a_file_does_not_say_in_which_process_tokens_were(tmp_path: Path) -> None:
    here, there, path = Everything(), Lamina(threads=1), tmp_path / "cache.safetensors"
    for saved, loaded in ((here, there), (there, here)):
        layer, again = fed(saved), CachedAttention(loaded)
        save_stores(path, [(saved, layer.kept)], {})
        CacheFile.read(path).fill([(loaded, again.kept)])
        assert torch.allclose(steps(layer), steps(again), atol=1e-6)
    evicting = compose(keep=SinkRecent(sinks=2, recent=7))
    save_stores(path, [(evicting, fed(evicting).kept)], {})
    with pytest.raises(CacheFileError, match="tokens: expected all tokens, in order of their positions, in an att"):
        opened(path, there)


def test_what_steps_keep_is_of_an_equal_policy_alone(folder: Path) -> None:
    policy, path = POLICIES["recycled"], file_of("recycled", folder)
    assert opened(path, replace(policy)).derived.keys() == {"recycled"}
    assert not opened(path, replace(policy, tokens=9)).derived
    assert not opened(path, Everything()).derived


def test_components_that_were_given_are_part_of_a_policy(tmp_path: Path) -> None:
    given, path = torch.linalg.qr(torch.randn(4, 8, 8)).Q, tmp_path / "cache.safetensors"
    policies = [Loki(tokens=8, dims=4, components=(x,)) for x in (given, given.clone(), given.flip(2))]
    save_stores(path, [(policies[0], fed(policies[0]).kept)], {})
    assert [bool(opened(path, policy).derived) for policy in policies] == [True, True, False]


def test_what_no_policy_declares_is_not_saved_in_silence(tmp_path: Path) -> None:
    policy = compose(keep=SinkRecent())
    store = fed(policy).kept
    store.derived["plan"] = Derived(store.changes, {"x": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"derived\['plan'\] of Composed.*expected one of \[\], see `derives`"):
        save_stores(tmp_path / "cache.safetensors", [(policy, store)], {})
    store.derived["plan"].changes -= 1  # of slots that have moved
    save_stores(tmp_path / "cache.safetensors", [(policy, store)], {})


@pytest.mark.parametrize("name", ["evicted", "zipcache", "chai", "lamina", "retrieval"])
def test_no_damaged_file_is_read(name: str, folder: Path, tmp_path: Path) -> None:
    whole, path, chance = file_of(name, folder).read_bytes(), tmp_path / "cache.safetensors", random.Random(0)
    sizes = [0, 7, 8, 100, len(whole) // 2, len(whole) - 1, *(chance.randrange(len(whole)) for _ in range(40))]
    damaged = [whole[:size] for size in sizes] + [whole + b"0", whole + whole]
    start = 8 + int.from_bytes(whole[:8], "little")
    places = [*range(8), *(chance.randrange(8, start) for _ in range(150))]
    places += [chance.randrange(start, len(whole)) for _ in range(150)]
    flips = ((place, bytes([whole[place] ^ 1 << chance.randrange(8)])) for place in places)
    damaged += [whole[:place] + byte + whole[place + 1 :] for place, byte in flips]
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(CacheFileError, match="not a whole cache|expected a cache of Saccade"):
            CacheFile.read(path)


@pytest.mark.parametrize("name", ["evicted", "bits=4", "kivi", "zipcache", "chai", "chai, waiting", "lamina"])
def test_no_tensor_may_be_missing_or_another(name: str, folder: Path, tmp_path: Path) -> None:
    policy, path = POLICIES[name], file_of(name, folder)
    assert opened(forged(path, lambda *_: None, tmp_path / "same"), policy).tokens

    def refused(change: Callable[[list[dict], dict[str, Tensor]], Any]) -> None:
        with pytest.raises(CacheFileError, match=r"layer 0 has "):
            opened(forged(path, change, tmp_path / "forged"), policy)

    for key, x in CacheFile.read(path).tensors.items():
        refused(lambda _, found, key=key: found.pop(key))
        refused(lambda _, found, key=key, x=x: found.update({key: x.to(torch.complex64)}))
        refused(lambda _, found, key=key, x=x: found.update({key: x[:-1]}))
        refused(lambda _, found, key=key, x=x: found.update({key: torch.cat([x, x])}))
        refused(lambda _, found, key=key, x=x: found.update({key: x[None]}))
        if x.dtype in (torch.int32, torch.int64):
            for number in (-5, -(2**31), 2**30)[: 2 if key == "0.seen" else 3]:  # many may have come, and gone
                refused(lambda _, found, key=key, x=x, number=number: found.update({key: torch.full_like(x, number)}))
    refused(lambda _, found: found.update({"0.tokens.more": torch.zeros(3)}))
    refused(lambda _, found: found.update({"0.derived x.y": torch.zeros(3)}))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("chai", lambda _, x: x["0.leader"].fill_(1), "'leader': expected heads with as many|keys of heads that lead"),
        ("chai", lambda _, x: x["0.leader"].copy_(torch.tensor([1, 0, 2, 3])), "heads 0 to 3 that read their own keys"),
        ("chai", lambda _, x: x["0.grouped"].zero_(), "'early' is missing"),
        (
            "chai", lambda _, x: (x["0.grouped"].zero_(), x.update({"0.early": torch.zeros(2, 4, 5, 8)})),
            "to lead itself where clusters are not found yet",
        ),
        ("chai", lambda _, x: x["0.noted"].fill_(9), "'noted': expected 0 to 5 tokens"),
        ("chai, waiting", lambda _, x: x.update({"0.early": x["0.early"][:, :3]}), "'early' of 3 heads: expected a m"),
        ("kivi", lambda _, x: x["0.seen"].add_(-30), "expected (at most|positions)"),
        ("evicted", lambda _, x: x["0.tokens.position"].zero_(), "expected positions of different tokens"),
        ("evicted", lambda layers, _: layers[0]["store"].update(dims=[8, 2**40]), "expected two head dims"),
        ("evicted", lambda layers, _: layers[0]["store"].update(dims=[8, 16]), "'tokens.value' of shape"),
        ("evicted", lambda layers, _: layers[0]["store"].update(dims="88"), "expected two head dims"),
        ("evicted", lambda layers, _: layers[0]["store"].update(dtype="int8"), "KeyError: 'int8'"),
        ("evicted", lambda layers, _: layers[0]["store"].update(dtype="float64"), "of shape .*torch.float32: expected"),
        ("evicted", lambda layers, _: layers[0].update(store=None), "expected no such tensors"),
        ("evicted", lambda layers, _: layers[0].pop("form"), "KeyError: 'form'"),
        ("evicted", lambda layers, _: layers[0].update(derived=[1]), "AttributeError"),
        ("evicted", lambda layers, _: layers.append(layers[0]), "2 layers, expected 1"),
        ("evicted", lambda layers, _: layers.clear(), "0 layers, expected 1"),
        ("evicted", lambda _, x: x.update({"1.seen": x["0.seen"].clone()}), "tensor '1.seen', expected those of 1"),
        ("evicted", lambda _, x: x.update({"x": x["0.seen"].clone()}), "tensor 'x', expected those of 1 layers"),
        ("recycled", lambda _, x: x["0.derived recycled.order"].fill_(99), r"in \[99, 99\]: expected numbers from -1"),
        ("recycled", lambda _, x: x.update({"0.derived recycled.query": torch.zeros(2, 3)}), "'query' of shape"),
        ("recycled", lambda _, x: x.update({"0.derived recycled.full": torch.zeros(2)}), "'full' of shape"),
        ("recycled", lambda layers, _: layers[0]["derived"]["recycled"].pop(), "expected no such tensors"),
        ("retrieval", lambda _, x: x["0.derived query graph.links"].fill_(40), "expected numbers from -1 to"),
        ("retrieval", lambda _, x: x["0.derived query graph.lists"].fill_(30), "expected numbers from -1 to 29"),
        ("loki", lambda _, x: x.update({"0.derived loki.rows": torch.zeros(2, 4, 9, 4)}), "'rows' of shape"),
    ],
)  # fmt: skip
def test_forged_contents_are_refused(name: str, change: Any, message: str, folder: Path, tmp_path: Path) -> None:
    path = forged(file_of(name, folder), change, tmp_path / "forged")
    with pytest.raises(CacheFileError, match=message):
        opened(path, POLICIES[name])


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("evicted", "kivi"), ("evicted", "bits=4"), ("kivi", "zipcache"), ("chai", "vattention"), ("lamina", "evicted"),
        ("instinfer", "lamina"), ("zipcache", "kivi"), ("chai", "chai, waiting"),
    ],
)  # fmt: skip
def test_stores_of_another_form_are_refused(name: str, other: str, folder: Path) -> None:
    with pytest.raises(CacheFileError, match=r"layer 0 has a store of the form \{.*\}, expected \{.*policy has"):
        opened(file_of(name, folder), POLICIES[other])


def test_a_reservation_that_a_file_exceeds_is_refused(tmp_path: Path) -> None:
    plain, path = compose(store=Storage(page=4096)), tmp_path / "cache.safetensors"
    store = plain.store()
    store.append(torch.zeros(1, 1, 4097, 4), torch.zeros(1, 1, 4097, 4))
    save_stores(path, [(plain, store)], {})
    with pytest.raises(CacheFileError, match="4,097 tokens: expected at most 4,096, for which addresses are kept"):
        opened(path, VAttention(tokens=4096))


def test_files_of_other_programs_and_versions_are_refused(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "cache.safetensors"
    safetensors.save_file({"x": torch.zeros(3)}, path)
    with pytest.raises(CacheFileError, match="of format None, version None: expected a cache of Saccade, version 2"):
        CacheFile.read(path)
    header = {"format": "saccade-cache", "version": "3", "layers": "[]", "about": "{}"}
    safetensors.save_file({"x": torch.zeros(3)}, path, metadata=header)
    with pytest.raises(CacheFileError, match="version '3': expected a cache of Saccade, version 2 or 1"):
        CacheFile.read(path)
    safetensors.save_file({"x": torch.zeros(3)}, path, metadata=header | {"version": "2"})
    with pytest.raises(CacheFileError, match="not a whole cache: KeyError: 'digest'"):
        CacheFile.read(path)
    for other in (tmp_path / "none", tmp_path):
        with pytest.raises(CacheFileError, match="not a whole cache"):
            CacheFile.read(other)


def first_version(path: Path, stores: list[KVStore], about: dict[str, Any]) -> None:
    """A file as the first version was written: tensors `[B, G, n, width]`, anything past a head's length."""
    found, layers = {}, []
    for number, store in enumerate(stores):
        dtype = None if store.storage.dtype is None else str(store.storage.dtype).removeprefix("torch.")
        layers.append({
            "empty": store.empty, "storage": asdict(store.storage) | {"dtype": dtype}, "stats": store.stats,
            "ordered": store.ordered, "dtype": str(store.dtype).removeprefix("torch."), "dims": store.dims,
        })  # fmt: skip
        if not store.empty:
            parts = {name: store.table.whole(name) for name in store.table.layout.parts}
            parts |= {"lengths": store.lengths, "seen": store.seen}
            if store.channels is not None:
                parts |= {"key_channels": store.channels[0], "value_channels": store.channels[1]}
            found |= {f"{number}.{name}": part.clone() for name, part in parts.items()}
    header = {"format": "saccade-cache", "version": "1", "layers": json.dumps(layers), "about": json.dumps(about)}
    safetensors.save_file(found, path, metadata=header)


@pytest.mark.parametrize("name", ["evicted", "bits=4", "bits=2", "dtype", "vattention"])
def test_files_of_the_first_version_are_read(name: str, tmp_path: Path) -> None:
    policy, path = POLICIES[name], tmp_path / "cache.safetensors"
    layer, again, empty = fed(policy), CachedAttention(policy), policy.store()
    first_version(path, [layer.kept, policy.store()], {"model": "toy", "lengths": [43, 0]})
    file = CacheFile.read(path)
    assert file.about == {"model": "toy", "lengths": [43, 0], "length": 43}
    file.fill([(policy, again.kept), (policy, empty)])
    assert empty.empty
    assert torch.equal(again.kept.positions, layer.kept.positions)
    assert torch.equal(steps(again), steps(layer))
    whole = path.read_bytes()
    for size in (0, 9, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CacheFileError, match="not a whole cache"):
            CacheFile.read(path)
    path.write_bytes(whole.replace(b'"0.seen"', b'"0.soon"'))
    with pytest.raises(CacheFileError, match="'seen' is missing|not a whole cache"):
        opened(path, policy)


def test_what_cannot_be_written_leaves_what_was_there(tmp_path: Path) -> None:
    path, layers = tmp_path / "cache.safetensors", [(POLICIES["kivi"], fed(POLICIES["kivi"]).kept)]
    save_stores(path, layers, {})
    before = path.read_bytes()
    (tmp_path / "cache.safetensors.part").mkdir()
    with pytest.raises(OSError, match="cache"):
        save_stores(path, layers, {})
    assert path.read_bytes() == before


def test_a_full_disk_leaves_file_and_stores_as_they_were(tmp_path: Path) -> None:
    names = ("evicted", "zipcache", "chai")
    path, layers = tmp_path / "cache.safetensors", [(POLICIES[name], fed(POLICIES[name]).kept) for name in names]
    save_stores(path, layers, {})
    before, keys = path.read_bytes(), [store.keys for _, store in layers]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))  # as if the disk were full
    try:
        with pytest.raises(OSError, match="cannot be written.*File too large"):
            save_stores(path, layers, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == before
    assert all(torch.equal(store.keys, was) for (_, store), was in zip(layers, keys, strict=True))
