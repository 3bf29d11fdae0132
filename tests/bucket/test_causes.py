"""What hinders a request to S3 is named, with what ends it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from botocore.exceptions import BotoCoreError, ClientError, SSOTokenLoadError, UnauthorizedSSOTokenError
from support.s3_proxy import Answer, open_proxy
from support.tls import make_certificate

from flux_prefect.bucket.causes import explain_failure
from flux_prefect.bucket.image_bucket import ImageBucket
from flux_prefect.errors import BucketAccessDenied, BucketError, BucketUnavailable

KEYS = {"aws_access_key_id": "A", "aws_secret_access_key": "b"}
WRONG_ADVICE = ("endpoint_url", "check the keys")


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty configuration of AWS: no keys, no profile."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_PROFILE", "work")
    return tmp_path / "config"


async def refused(**fields: str) -> BucketError:
    """What the check of a bucket says."""
    with pytest.raises(BucketError) as caught:
        await ImageBucket.model_validate({"bucket_name": "images", **fields}).check()
    assert not caught.value.retryable
    assert not [advice for advice in WRONG_ADVICE if advice in str(caught.value)]
    return caught.value


@pytest.mark.usefixtures("config")
async def test_a_missing_profile_is_named() -> None:
    """With the variable that names it."""
    error = await refused()
    assert isinstance(error, BucketAccessDenied)
    assert "(work)" in str(error)
    assert "AWS_PROFILE" in str(error)


async def test_a_broken_credential_process_is_named(config: Path) -> None:
    """With what the command said."""
    command = f"{sys.executable} -c \"import sys; sys.exit('vault is sealed')\""
    config.write_text(f"[profile work]\ncredential_process = {command}\n")
    error = await refused(endpoint_url="http://127.0.0.1:9")
    assert isinstance(error, BucketAccessDenied)
    assert "vault is sealed" in str(error)
    assert "credential_process" in str(error)


@pytest.mark.parametrize("error", [SSOTokenLoadError(error_msg="no file"), UnauthorizedSSOTokenError()])
def test_an_sso_session_that_is_over_names_its_command(error: BotoCoreError) -> None:
    """`aws sso login`."""
    explained = explain_failure(error, "s3://images")
    assert isinstance(explained, BucketAccessDenied)
    assert "aws sso login" in str(explained)
    assert not explained.retryable


@pytest.mark.parametrize(
    ("status", "code", "message", "advice"),
    [
        (400, "ExpiredToken", "The provided token has expired.", "have expired"),
        (403, "RequestTimeTooSkewed", "The difference is too large.", "timedatectl"),
        (400, "AuthorizationHeaderMalformed", "expecting 'eu-west-1'", "region_name"),
        (403, "AccessDenied", "with an explicit deny in a resource-based policy", "server_side_encryption"),
    ],
)
async def test_a_cause_that_s3_names_is_passed_on(status: int, code: str, message: str, advice: str) -> None:
    """Each with its own remedy, from the write that comes before the first paid call."""
    body = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
    with open_proxy("http://127.0.0.1:9") as proxy:
        proxy.meddle = lambda _: Answer(status, {}, body)
        bucket = ImageBucket.model_validate({"bucket_name": "images", "endpoint_url": proxy.url, **KEYS})
        with pytest.raises(BucketAccessDenied) as caught:
            await bucket.prove_writable()
    assert isinstance(caught.value.__cause__, ClientError)
    assert advice in str(caught.value)
    assert message in str(caught.value)
    assert "check the keys" not in str(caught.value)


async def test_a_certificate_that_is_not_trusted_is_reported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no passing failure; with the authority's certificate the same bucket answers."""
    path, tls = make_certificate(tmp_path)
    with open_proxy("http://127.0.0.1:9", tls=tls) as proxy:
        proxy.meddle = lambda _: Answer(200, {}, b"")
        assert "AWS_CA_BUNDLE" in str(await refused(endpoint_url=proxy.url, **KEYS))
        assert not proxy.passed

        monkeypatch.setenv("AWS_CA_BUNDLE", str(path))
        await ImageBucket.model_validate({"bucket_name": "images", "endpoint_url": proxy.url, **KEYS}).check()
        assert proxy.passed


async def test_a_proxy_that_is_down_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its variable, and it may come back."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    bucket = ImageBucket.model_validate({"bucket_name": "images", "endpoint_url": "http://s3.invalid", **KEYS})
    with pytest.raises(BucketUnavailable, match="HTTP_PROXY") as caught:
        await bucket.check()
    assert "endpoint_url" not in str(caught.value)
