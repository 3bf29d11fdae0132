"""What hinders a request to S3 that is neither the keys' fault nor the server's: its cause, and what ends it."""

from __future__ import annotations

from botocore.exceptions import (
    BotoCoreError,
    ConfigNotFound,
    ConfigParseError,
    CredentialRetrievalError,
    InvalidConfigError,
    MetadataRetrievalError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
    ProxyConnectionError,
    SSLError,
    SSOError,
    TokenRetrievalError,
)

from flux_prefect.errors import BucketAccessDenied, BucketError, BucketUnavailable

__all__ = ["explain_failure", "explain_refusal"]

_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired"}
_REGION = {"AuthorizationHeaderMalformed", "PermanentRedirect", "IllegalLocationConstraintException"}
_SKEWED = {"RequestTimeTooSkewed", "RequestInTheFuture"}
_ADVICE: tuple[tuple[tuple[type[BotoCoreError], ...], str], ...] = (
    ((SSOError, TokenRetrievalError), "Run `aws sso login`, with --profile where AWS_PROFILE names one."),
    (
        (ProfileNotFound,),
        "Correct AWS_PROFILE, or add the profile to ~/.aws/config (`aws configure list-profiles` shows them).",
    ),
    (
        (CredentialRetrievalError,),
        "Correct the source of keys that it names: `aws sts get-caller-identity` tries the same.",
    ),
    ((MetadataRetrievalError,), "The role of this machine or container gives no keys: see that it has one."),
    (
        (ConfigNotFound, ConfigParseError, InvalidConfigError),
        "Correct ~/.aws/config, or the file that AWS_CONFIG_FILE names.",
    ),
)


def explain_failure(error: BotoCoreError, where: str) -> BucketError:
    """The error for a request that no server answered."""
    if isinstance(error, (NoCredentialsError, PartialCredentialsError)):
        return BucketAccessDenied(
            f"There are no S3 keys for {where}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "a profile or a role, or fill them in on the ImageBucket block."
        )
    if isinstance(error, SSLError):
        return BucketError(
            f"No safe connection for {where}: {error}. If the server or a proxy has a certificate of a private "
            "authority, set AWS_CA_BUNDLE (or REQUESTS_CA_BUNDLE) to the file of that authority's certificate."
        )
    if isinstance(error, ProxyConnectionError):
        return BucketUnavailable(f"{where}: {error}. Correct HTTPS_PROXY or HTTP_PROXY, or add the host to NO_PROXY.")
    if advice := _advice(error):
        return BucketAccessDenied(f"There are no S3 keys for {where}: {error}. {advice}")
    return BucketUnavailable(f"{where} can't be reached: {error}. Check endpoint_url or AWS_ENDPOINT_URL_S3.")


def _advice(error: BotoCoreError) -> str | None:
    if isinstance(error, CredentialRetrievalError) and error.kwargs.get("provider") == "custom-process":
        return "Run the command that credential_process in ~/.aws/config names, and correct it."
    return next((advice for kinds, advice in _ADVICE if isinstance(error, kinds)), None)


def explain_refusal(code: str, message: str, server: str, what: str) -> BucketError | None:
    """The error for an answer of S3 whose cause its code or message names; None for any other.

    Args:
        code: S3's code.
        message: what S3 says.
        server: its address.
        what: the operation and the object.
    """
    answer = f"{code}: {message}".rstrip(": ")
    if code in _EXPIRED:
        return BucketAccessDenied(
            f"The temporary keys for {what} have expired ({answer}): renew them (`aws sso login`, a new "
            "AWS_SESSION_TOKEN). A profile or a role renews them by itself."
        )
    if code in _SKEWED:
        return BucketAccessDenied(
            f"The clock of this machine is not that of {server} ({answer}): set it (`timedatectl set-ntp true`)."
        )
    if code in _REGION:
        return BucketAccessDenied(
            f"The bucket of {what} is in another region ({answer}): set region_name of the Image Bucket block or "
            "AWS_DEFAULT_REGION to it."
        )
    if code == "AccessDenied" and "explicit deny" in message and what.startswith(("PutObject", "CopyObject")):
        return BucketAccessDenied(
            f"A policy forbids {what} as it was requested ({answer}). If it demands encryption, set "
            "server_side_encryption and kms_key_id of the Image Bucket block; if it demands tags, set tags."
        )
    return None
