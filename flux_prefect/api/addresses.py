"""The addresses that an image may be downloaded from.

The service supplies the URL, and a machine that runs pipelines can reach more than the internet: a cloud's metadata,
databases, admin pages. Images are therefore downloaded from public addresses only, unless the service itself is in a
private network, as the sandbox is.
"""

from __future__ import annotations

import ipaddress
import socket
from contextlib import suppress

import anyio
import httpx
from aiohttp.abc import AbstractResolver, ResolveResult

from flux_prefect.errors import DownloadInterrupted, UnsafeURL

__all__ = ["AddressRules", "CheckedResolver"]

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


class AddressRules:
    """Checks of URLs and addresses, relative to the service's own address.

    Args:
        endpoint: the root URL of the service.
    """

    def __init__(self, endpoint: str) -> None:
        self._endpoint = httpx.URL(endpoint)

    async def check_url(self, url: httpx.URL, *, proxied: bool) -> None:
        """Check the scheme and the host before anything is sent. Costs one DNS look-up.

        Args:
            url: the URL to request.
            proxied: whether a proxy will connect. The proxy resolves names itself, so a name that can't be resolved
                here is allowed.

        Raises:
            UnsafeURL: the URL must not be fetched.
            DownloadInterrupted: the host's name could not be resolved.
        """
        schemes = {"https", self._endpoint.scheme}
        if url.scheme not in schemes or not url.host:
            raise UnsafeURL(
                f"The image's URL ({url.scheme or 'no'}:// to {url.host or 'no host'}) is not fetched: "
                "only https is allowed, and http if base_url is http."
            )
        try:
            addresses = await _look_up(url)
        except UnicodeError:
            raise UnsafeURL(f"The image's URL names a host that cannot exist: {url.host[:80]}…") from None
        except socket.gaierror as error:
            if proxied:
                return
            raise DownloadInterrupted(
                f"The image's host {url.host} could not be looked up ({error.strerror}): check the network's DNS."
            ) from error
        for address in addresses:
            await self._check(address, url.host)

    async def check_address(self, address: str, host: str) -> None:
        """Check an address to which the host's name was resolved.

        Raises:
            UnsafeURL: the address must not be connected to.
        """
        await self._check(_parse(address), host)

    async def _check(self, address: _Address, host: str) -> None:
        if _is_public(address):
            return
        try:
            endpoint_addresses = await _look_up(self._endpoint)
        except (socket.gaierror, UnicodeError):
            endpoint_addresses = []
        if address in endpoint_addresses:
            return
        if _is_local(address) and any(_is_local(each) for each in endpoint_addresses):
            return
        raise UnsafeURL(
            f"The image's host {host} is {address}, which is not a public address: images are fetched from "
            "such an address only if base_url is in a private network too."
        )


class CheckedResolver(AbstractResolver):
    """A resolver for connections that returns only addresses that the rules allow.

    A name may resolve to another address than when its URL was checked, so the address that is connected to is
    checked as well.
    """

    def __init__(self, rules: AddressRules) -> None:
        self._rules = rules

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Resolve the host to all of its addresses.

        Raises:
            UnsafeURL: one of them must not be connected to.
            OSError: there are none.
        """
        found = []
        for kind, _, protocol, _, sockaddr in await anyio.getaddrinfo(
            host, port, family=family, type=socket.SOCK_STREAM
        ):
            await self._rules.check_address(sockaddr[0], host)
            found.append(
                ResolveResult(
                    hostname=host,
                    host=sockaddr[0],
                    port=port,
                    family=kind,
                    proto=protocol,
                    flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
                )
            )
        return found

    async def close(self) -> None:
        """Do nothing: no connection is held."""


async def _look_up(url: httpx.URL) -> list[_Address]:
    with suppress(ValueError):
        return [_parse(url.host)]  # an address needs no look-up
    port = url.port or {"http": 80, "https": 443}[url.scheme]
    found = await anyio.getaddrinfo(url.raw_host.decode("ascii").strip("[]"), port, type=socket.SOCK_STREAM)
    return [_parse(sockaddr[0]) for *_, sockaddr in found]


def _parse(text: str) -> _Address:
    address = ipaddress.ip_address(text)
    return (_embedded(address) if isinstance(address, ipaddress.IPv6Address) else None) or address


def _embedded(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address to which packets for this address are routed, or None."""
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour


def _is_public(address: _Address) -> bool:
    return address.is_global and not address.is_multicast and not address.is_reserved


def _is_local(address: _Address) -> bool:
    """A private network or this machine. Never link-local, where clouds serve metadata and credentials."""
    return address.is_loopback or (
        address.is_private
        and not (address.is_link_local or address.is_multicast or address.is_reserved or address.is_unspecified)
    )
