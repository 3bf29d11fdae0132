"""Which addresses an image may be fetched from.

A result URL is the service's word, and a machine that runs pipelines reaches more than the internet: a cloud's
metadata, databases, admin pages. So an image comes from a public address only, unless the service itself
stands in a private network, as a local stand-in does.
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
    """What may be fetched, given where the service is.

    Args:
        endpoint: the root URL of the service.
    """

    def __init__(self, endpoint: str) -> None:
        self._endpoint = httpx.URL(endpoint)

    async def check_url(self, url: httpx.URL, *, proxied: bool) -> None:
        """Check scheme and host before anything is sent. Costs a look-up of the host's name.

        Args:
            url: where the request would go.
            proxied: a proxy will connect, and its view of the names is the one that counts: a name that
                can't be looked up here is left to it.

        Raises:
            UnsafeURL: it must not be fetched.
            DownloadInterrupted: the host's name could not be looked up.
        """
        schemes = {"https", self._endpoint.scheme}
        if url.scheme not in schemes or not url.host:
            raise UnsafeURL(
                f"The image's URL ({url.scheme or 'no'}:// to {url.host or 'no host'}) is not fetched: "
                "only https is, and http where base_url itself is http."
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
        """Check an address that the host's name has led to.

        Raises:
            UnsafeURL: it must not be connected to.
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
            "one only where base_url is in a private network itself."
        )


class CheckedResolver(AbstractResolver):
    """Looks up names for connections, and gives away only addresses that the rules allow.

    A name may lead elsewhere than when its URL was checked: this is the look-up whose result is connected to.
    """

    def __init__(self, rules: AddressRules) -> None:
        self._rules = rules

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """All addresses of the host.

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
        """Nothing is kept open."""


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
    """The IPv4 address that packets to this one end up at."""
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour


def _is_public(address: _Address) -> bool:
    return address.is_global and not address.is_multicast and not address.is_reserved


def _is_local(address: _Address) -> bool:
    """A private network or this machine; never link-local, where clouds keep their metadata and credentials."""
    return address.is_loopback or (
        address.is_private
        and not (address.is_link_local or address.is_multicast or address.is_reserved or address.is_unspecified)
    )
