from __future__ import annotations

import asyncio
import logging
import pickle
import traceback
from contextlib import suppress

import pytest
from prefect.blocks.core import Block
from prefect.blocks.system import Secret
from prefect.testing.standard_test_suites.blocks import BlockStandardTestSuite
from pydantic import SecretStr, ValidationError

from flux_prefect.api.client import AimlApiClient
from flux_prefect.credentials import DEFAULT_BASE_URL, AimlApiCredentials

KEY = "aiml-secret-1f2e3d4c"


@pytest.fixture
def account() -> AimlApiCredentials:
    """An account at an address where nothing listens."""
    return AimlApiCredentials(api_key=SecretStr(KEY), base_url="http://127.0.0.1:9")


class TestBlock(BlockStandardTestSuite):
    """Prefect's own demands on a block."""

    @pytest.fixture
    def block(self) -> type[Block]:
        """The block's class."""
        return AimlApiCredentials

    def test_has_a_valid_image(self, block: type[Block]) -> None:
        """The logo is the one of Prefect's own Secret block; the suite would fetch it from the network."""
        assert block._logo_url == Secret._logo_url  # Prefect has no public name for it


class TestFromEnvironment:
    """The account that the environment names."""

    @pytest.fixture(autouse=True)
    def bare(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Start without any account."""
        for name in ("AIMLAPI_KEY", "AIML_API_KEY", "AIMLAPI_BASE_URL"):
            monkeypatch.delenv(name, raising=False)

    @pytest.mark.parametrize("name", ["AIMLAPI_KEY", "AIML_API_KEY"])
    def test_either_name_of_the_key_works(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        """Both names that clients of the service use are read; the real service is the default."""
        monkeypatch.setenv(name, KEY)
        account = AimlApiCredentials.from_env()
        assert account.api_key.get_secret_value() == KEY
        assert account.base_url == DEFAULT_BASE_URL

    def test_our_name_comes_first(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """AIMLAPI_KEY wins over AIML_API_KEY, unless it is empty."""
        monkeypatch.setenv("AIML_API_KEY", "second")
        monkeypatch.setenv("AIMLAPI_KEY", "first")
        assert AimlApiCredentials.from_env().api_key.get_secret_value() == "first"
        monkeypatch.setenv("AIMLAPI_KEY", "")
        assert AimlApiCredentials.from_env().api_key.get_secret_value() == "second"

    @pytest.mark.parametrize(
        ("value", "root"), [("http://127.0.0.1:8080/", "http://127.0.0.1:8080"), ("", DEFAULT_BASE_URL)]
    )
    def test_the_address_can_be_named(self, monkeypatch: pytest.MonkeyPatch, value: str, root: str) -> None:
        """AIMLAPI_BASE_URL leads to another root; empty is as good as not set."""
        monkeypatch.setenv("AIMLAPI_KEY", KEY)
        monkeypatch.setenv("AIMLAPI_BASE_URL", value)
        assert AimlApiCredentials.from_env().base_url == root

    @pytest.mark.parametrize("key", [None, ""])
    def test_no_key_is_an_error_that_names_the_variable(self, monkeypatch: pytest.MonkeyPatch, key: str | None) -> None:
        """The message says what to set."""
        if key is not None:
            monkeypatch.setenv("AIMLAPI_KEY", key)
        with pytest.raises(ValueError, match=r"set AIMLAPI_KEY \(or AIML_API_KEY\)"):
            AimlApiCredentials.from_env()

    async def test_nothing_given_means_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A flow without a credentials parameter takes the environment's; a block is taken as it is."""
        monkeypatch.setenv("AIMLAPI_KEY", KEY)
        account = await AimlApiCredentials.resolve(None)
        assert account.api_key.get_secret_value() == KEY
        assert await AimlApiCredentials.resolve(account) is account


@pytest.mark.parametrize(
    ("given", "root"),
    [
        ("https://api.aimlapi.com", "https://api.aimlapi.com"),
        ("https://api.aimlapi.com/", "https://api.aimlapi.com"),
        (" HTTPS://API.aimlapi.com// ", "https://api.aimlapi.com"),
        ("http://127.0.0.1:8080", "http://127.0.0.1:8080"),
        ("http://[::1]:8080/", "http://[::1]:8080"),
        ("https://proxy.example.com/aiml", "https://proxy.example.com/aiml"),
    ],
)
def test_a_root_is_kept_in_one_form(given: str, root: str) -> None:
    """However it is written, one service is one endpoint, and so one cache."""
    assert AimlApiCredentials(api_key=SecretStr(KEY), base_url=given).base_url == root


@pytest.mark.parametrize(
    ("given", "remedy"),
    [
        ("api.aimlapi.com", "https://api.aimlapi.com"),
        ("", "https://api.aimlapi.com"),
        ("https://api.aimlapi.com/v1", "use the root, https://api.aimlapi.com"),
        ("https://api.aimlapi.com/v1/", "use the root, https://api.aimlapi.com"),
        ("https://api.aimlapi.com/v2", "use the root, https://api.aimlapi.com"),
        ("ftp://api.aimlapi.com", "write it as https://api.aimlapi.com"),
        ("https://", "is not a web address"),
        ("https:///v1/images", "a host"),
        ("https://user:word@api.aimlapi.com", "no user"),
        ("https://api.aimlapi.com?key=1", "no query"),
        ("https://api.aimlapi.com#top", "no query"),
        ("https://api.aimlapi.com:port", "base_url"),
    ],
)
def test_what_is_no_root_is_refused_with_a_remedy(given: str, remedy: str) -> None:
    """A wrong address is found when the block is made, not when a run is half done."""
    with pytest.raises(ValidationError, match=remedy) as refusal:
        AimlApiCredentials(api_key=SecretStr(KEY), base_url=given)
    assert KEY not in str(refusal.value)


class TestSecrecy:
    """The key goes to the service and nowhere else."""

    def test_the_key_is_not_shown(self, account: AimlApiCredentials) -> None:
        """Neither the block nor its client or errors spell it out."""
        with pytest.raises(ValidationError) as refusal:
            AimlApiCredentials(api_key=SecretStr(KEY), max_in_flight=0)
        client = account.get_client()
        shown = [repr(account), str(account), account.model_dump_json(), str(account.model_dump()), repr(client)]
        assert not [text for text in [*shown, str(refusal.value), repr(refusal.value)] if KEY in text]
        asyncio.run(client.aclose())

    def test_a_block_without_a_key_is_refused(self) -> None:
        """An empty key is an error at once."""
        with pytest.raises(ValidationError, match="api_key"):
            AimlApiCredentials(api_key=SecretStr(""))

    async def test_the_key_is_in_no_error_of_a_call(
        self, account: AimlApiCredentials, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Neither message, traceback, pickle nor log of a failed call holds it."""
        with caplog.at_level(logging.DEBUG), pytest.raises(Exception, match="No connection") as failure:
            async with account.open_client() as client:
                await client.balance()
        output = "".join(traceback.format_exception(failure.value)) + caplog.text
        assert KEY not in output
        assert KEY.encode() not in pickle.dumps(failure.value)


class TestOpenClient:
    """One client for all that belongs together."""

    async def test_an_enclosed_use_shares_the_client(self, account: AimlApiCredentials) -> None:
        """Blocks inside each other, and the tasks started inside, have one client; afterwards a new one is made."""

        async def use() -> AimlApiClient:
            async with account.open_client() as client:
                return client

        async with account.open_client() as outer:
            async with account.open_client() as inner:
                assert inner is outer
            assert set(await asyncio.gather(use(), use())) == {outer}
            assert await use() is outer
        assert await use() is not outer

    async def test_equal_accounts_share(self, account: AimlApiCredentials) -> None:
        """What counts is the account, not the object: Prefect copies its parameters."""
        async with account.open_client() as outer, account.model_copy().open_client() as inner:
            assert inner is outer

    @pytest.mark.parametrize(
        "change", [{"api_key": SecretStr("another")}, {"base_url": "http://127.0.0.1:10"}, {"read_timeout": 1.0}]
    )
    async def test_another_account_has_its_own(self, account: AimlApiCredentials, change: dict[str, object]) -> None:
        """A call is never sent with another account's key, to another's address or with another's patience."""
        async with account.open_client() as outer:
            async with account.model_copy(update=change).open_client() as other:
                assert other is not outer
            async with account.open_client() as again:
                assert again is outer

    async def test_another_event_loop_has_its_own(self, account: AimlApiCredentials) -> None:
        """A thread with a loop of its own can't use a client of this one, though it inherits the context."""

        async def use() -> AimlApiClient:
            async with account.open_client() as client:
                return client

        async with account.open_client() as outer:
            assert await asyncio.to_thread(lambda: asyncio.run(use())) is not outer

    async def test_the_client_is_closed_after_an_error(self, account: AimlApiCredentials) -> None:
        """An error inside the block passes through, and the next block gets a new client."""
        seen: list[AimlApiClient] = []
        for _ in range(2):
            with suppress(LookupError):
                async with account.open_client() as client:
                    seen.append(client)
                    raise LookupError
        assert seen[0] is not seen[1]
        with pytest.raises(RuntimeError, match="closed"):
            await seen[0].balance()
