"""What a store refuses is one message that says where, what it said and what to do; no secret is in it."""

from pathlib import Path

import pytest
from interleavings import content_of
from obstore.store import MemoryStore
from running import Settings, arguments, dflash, refused
from servers import KEY, SECRET, Answer, environment, troubled_server

from dflash_offline.stages.buckets.bucket import Bucket
from dflash_offline.stages.buckets.mirror import open_mirror

URL = "s3://bucket/caches/one"


@pytest.mark.parametrize(
    ("answer", "advice"),
    [
        ((403, "InvalidAccessKeyId"), "Correct the credentials in the environment"),
        ((403, "SignatureDoesNotMatch"), "Correct the credentials in the environment"),
        ((403, "RequestTimeTooSkewed"), "Set this machine's clock"),
        ((404, "NoSuchBucket"), "Make the bucket, or correct its name"),
    ],
)
def test_a_store_that_refuses_is_told_in_one_message_without_secrets(
    extract_config: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: Answer, advice: str
) -> None:
    assert answer
    with troubled_server(None, lambda _method, _path: answer) as port:
        for name, value in environment(port).items():
            monkeypatch.setenv(name, value)
        for command in (
            arguments(extract_config, Path(URL)),
            ["inspect", URL],
            ["verify", URL],
            ["train", URL, "--out", str(tmp_path / "run")],
        ):
            result = dflash(*command)
            refused(result, URL, answer[1], advice)
            assert len(result.stderr.splitlines()) <= 3
            assert KEY not in result.output and SECRET not in result.output and "It is planted. ***" in result.stderr


class Overwriting(Bucket):
    """A store that ignores what a write is conditional on."""

    def create(self, name: str, content: bytes | Path) -> bool:
        self.put(name, content)
        return True


def test_a_store_that_writes_over_what_is_there_is_refused_before_any_work(extract_config: Settings) -> None:
    store = MemoryStore()
    open_mirror("s3://overwriting/one", Overwriting("s3://overwriting/one", store))
    refused(dflash(*arguments(extract_config, Path("s3://overwriting/one"))), "s3://overwriting", "conditional writes")
    assert content_of(store) == {}


def test_an_address_with_credentials_is_refused_without_showing_them() -> None:
    for address in (f"s3://name:{SECRET}@bucket/cache".replace("/access", "-access"), "s3://bucket/cache?token=secret"):
        result = dflash("inspect", address)
        refused(result, "environment alone")
        assert "secret" not in result.output


def test_without_obstore_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "obstore", None)
    refused(dflash("inspect", "s3://bucket/no-obstore"), "pip install 'dflash-offline[store]'")
