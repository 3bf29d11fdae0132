"""The image service behind a certificate of a private authority."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr
from support.s3_proxy import Answer, Proxy, open_proxy
from support.tls import make_certificate

from flux_prefect.api import client as module
from flux_prefect.api.client import AimlApiClient, Timeouts
from flux_prefect.api.models import ImageRequest
from flux_prefect.api.pacing import Pacer
from flux_prefect.errors import AuthenticationFailed, Billed, InvalidSettings, NotSent


@pytest.fixture
def certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, Proxy]]:
    """Its file, and a service that refuses every key."""
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    path, tls = make_certificate(tmp_path)
    module._tls.cache_clear()
    with open_proxy("http://127.0.0.1:9", tls=tls) as server:
        server.meddle = lambda _: Answer(401, {}, b"{}")
        yield path, server
    module._tls.cache_clear()


async def generate(url: str) -> None:
    """One paid call."""
    key = SecretStr("k" * 32)
    async with AimlApiClient(api_key=key, base_url=url, pacer=Pacer(1), timeouts=Timeouts()) as client:
        await client.generate(ImageRequest(prompt="a lighthouse", seed=1))


async def test_a_certificate_that_is_not_trusted_is_reported_at_once(certificate: tuple[Path, Proxy]) -> None:
    """It cost nothing, another attempt can't help, and the message names the setting."""
    with pytest.raises(NotSent, match=r"certificate of .* is not trusted.*SSL_CERT_FILE") as caught:
        await generate(certificate[1].url)
    assert not caught.value.retryable
    assert caught.value.billed is Billed.NO
    assert not certificate[1].passed


@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"])
async def test_a_private_authority_is_trusted_where_a_variable_names_it(
    variable: str, certificate: tuple[Path, Proxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call reaches the service."""
    monkeypatch.setenv(variable, str(certificate[0]))
    with pytest.raises(AuthenticationFailed):
        await generate(certificate[1].url)


async def test_a_bundle_that_is_not_there_is_named(
    certificate: tuple[Path, Proxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its variable."""
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "nowhere.pem")
    with pytest.raises(InvalidSettings, match=r"REQUESTS_CA_BUNDLE=nowhere\.pem"):
        await generate(certificate[1].url)
