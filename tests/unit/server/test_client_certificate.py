"""What Envoy says of a caller's certificate, under the names that grpcio has for it."""

import pytest

from unroll_server.fronts.client_certificate import ALTERNATIVE_NAME, COMMON_NAME, names_in


@pytest.mark.parametrize(
    ("header", "common", "alternative"),
    [
        (b'Hash=ab12;Subject="CN=alice,O=x";URI=spiffe://a/b;DNS=a.test;DNS=b.test',
         [b"alice"], [b"spiffe://a/b", b"a.test", b"b.test"]),
        (b'Hash=ab12;Subject="O=x\\;URI=evil\\,CN=mallory,CN=bob"', [b"bob"], None),
        (b'Hash=ab12;Subject="CN=a\\"b\\, c\\\\\\C3\\BC"', ["a\"b, c\\\u00fc".encode()], None),
        (b'Hash=ab12;Subject="O=x";DNS=a.test;Subject="CN=evil";URI=spiffe://evil', None, [b"a.test"]),
        (b'Hash=ab12;Subject=""', None, None),
        (b"", None, None),
    ],
)  # fmt: skip
def test_names(header: bytes, common: list[bytes] | None, alternative: list[bytes] | None) -> None:
    found = names_in(header)
    assert found.get(COMMON_NAME) == common
    assert found.get(ALTERNATIVE_NAME) == alternative
