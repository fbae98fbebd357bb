"""What killed commands leave behind holds no erased row, and an erasure that was killed is told whole when it is given again."""

from __future__ import annotations

from pathlib import Path

import pytest
from store_bench import bytes_of, grown

from continual.refresh.folder import Folder
from continual.refresh.intake import row_ids


def test_what_is_left_of_an_update_that_was_over_goes(tmp_path: Path) -> None:
    store = grown(tmp_path, 2)
    (store.path / "work" / "try-0").mkdir(parents=True)
    (gone,) = row_ids(["m0-1"], store.folder.settings.salt)
    needle = int(gone).to_bytes(8, "little")
    (store.path / "work" / "try-0" / "tensors.safetensors").write_bytes(b"x" + needle)
    (store.path / "untold").mkdir(exist_ok=True)
    (store.path / "untold" / ".000003.json.0a1b2c3d.tmp").write_bytes(needle)
    store.erase(["m0-1"])
    assert not [name for name, content in bytes_of(store.path).items() if needle in content and name != "erased.json"]
    assert not (store.path / "work").exists() and store.verify() == []


@pytest.mark.parametrize("place", ["_put_in_place", "sweep"])
def test_an_erasure_that_was_killed_names_the_versions_and_commands_again(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = grown(tmp_path, 3)
    twin = tmp_path / "twin"
    twin.mkdir()
    store = grown(twin, 3)
    ids = [f"m1-{row}" for row in range(8)]
    expected = whole.erase(ids)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        real = getattr(Folder, place)

        def dies(self: Folder, *given: object) -> object:
            if store.history()[-1].event == "erased":
                raise KeyboardInterrupt
            return real(self, *given)

        patch.setattr(Folder, place, dies)
        store.erase(ids)
    again = store.erase(ids)
    assert again.known == 0 and again.unknown == () and again.trained == expected.trained == (2, 3)
    assert [one.replace(str(twin), "") for one in again.commands] == [
        one.replace(str(tmp_path), "") for one in expected.commands
    ]
    assert again.commands and "rollback" in again.commands[0] and "rows that were erased before" in again.sentence
    assert store.erase(["m2-1"]).trained == (3,), "another row is told by itself"
