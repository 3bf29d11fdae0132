"""Proxies from the environment."""

from __future__ import annotations

from pathlib import Path

import anyio
import httpx
import pytest
from support.socks_proxy import Behaviour, open_socks_proxy

from flux_prefect.api.client import AimlApiClient, Timeouts
from flux_prefect.api.models import ImageRequest
from flux_prefect.api.pacing import Pacer
from flux_prefect.api.transport import find_proxy
from flux_prefect.credentials import AimlApiCredentials
from flux_prefect.errors import Billed, InvalidSettings, NotSent
from flux_prefect.sandbox.launching import RunningSandbox

VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")


@pytest.fixture(autouse=True)
def no_other_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of the developer's own."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


def open_client(credentials: AimlApiCredentials, **timeouts: float) -> AimlApiClient:
    """A client of the sandbox."""
    return AimlApiClient(
        api_key=credentials.api_key, base_url=credentials.base_url, pacer=Pacer(1), timeouts=Timeouts(**timeouts)
    )


@pytest.mark.parametrize("scheme", ["socks5", "socks5h"])
async def test_a_socks_proxy_is_used_for_calls_and_downloads(
    scheme: str,
    sandbox: RunningSandbox,
    credentials: AimlApiCredentials,
    request_: ImageRequest,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """ALL_PROXY with a login: the image is paid for and fetched through it, and not past it."""
    address = httpx.URL(credentials.base_url)
    async with open_socks_proxy(login=("team", "s3cret")) as proxy:
        monkeypatch.setenv("ALL_PROXY", proxy.url.replace("socks5", scheme))
        async with open_client(credentials) as client:
            generation = await client.generate(request_)
            assert len(proxy.targets) == 1
            await client.download(
                generation.images[0].url or "", tmp_path / "image.jpg", expected=request_.output_format
            )
    assert set(proxy.targets) == {(address.host, address.port)}
    assert len(proxy.targets) == 2
    assert sandbox.control.summary().billed_calls == 1


@pytest.mark.parametrize("behaviour", [Behaviour.REFUSE, Behaviour.HANG_UP, Behaviour.BE_SILENT])
async def test_a_socks_proxy_that_does_not_connect_cost_nothing(
    behaviour: Behaviour,
    sandbox: RunningSandbox,
    credentials: AimlApiCredentials,
    request_: ImageRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is known that nothing was sent, within the time-out of a connection, and the password is not shown."""
    async with open_socks_proxy(login=("team", "s3cret")) as proxy:
        proxy.behaviour = behaviour
        monkeypatch.setenv("ALL_PROXY", proxy.url)
        async with open_client(credentials, connect=1) as client:
            with anyio.fail_after(10), pytest.raises(NotSent) as raised:
                await client.generate(request_)
    assert raised.value.billed is Billed.NO
    assert raised.value.retryable
    assert "s3cret" not in raised.value.message
    assert sandbox.control.summary().billed_calls == 0


async def test_a_wrong_login_is_not_sent(
    credentials: AimlApiCredentials, request_: ImageRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proxy's refusal is in the error."""
    async with open_socks_proxy(login=("team", "s3cret")) as proxy:
        monkeypatch.setenv("ALL_PROXY", proxy.url.replace("s3cret", "guess"))
        async with open_client(credentials) as client:
            with pytest.raises(NotSent, match="Invalid username/password"):
                await client.generate(request_)


@pytest.mark.parametrize("proxy", ["socks4://proxy:1080", "socks://proxy:1080", "http://:80", "http://proxy:high"])
def test_a_proxy_that_cannot_be_used_is_named_before_money(proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its variable, with what to write instead, and without the value: it may hold a password."""
    monkeypatch.setenv("AIMLAPI_KEY", "sk-test")
    monkeypatch.setenv("ALL_PROXY", proxy.replace("proxy", "user:s3cret@proxy"))
    with pytest.raises(InvalidSettings, match=r"ALL_PROXY .*socks5://HOST:PORT") as raised:
        AimlApiCredentials.from_env().get_client()
    assert "s3cret" not in raised.value.message


def test_the_environment_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheme's own variable goes before ALL_PROXY, NO_PROXY before both, and a bare address is an HTTP proxy."""
    url = httpx.URL("https://images.example.com/one.jpg")
    assert find_proxy(url) is None
    monkeypatch.setenv("ALL_PROXY", "socks5://all:1080")
    assert find_proxy(url) == "socks5://all:1080"
    monkeypatch.setenv("HTTPS_PROXY", "own:3128")
    assert find_proxy(url) == "http://own:3128"
    monkeypatch.setenv("NO_PROXY", "example.com")
    assert find_proxy(url) is None
