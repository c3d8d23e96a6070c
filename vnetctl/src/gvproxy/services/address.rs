//! Addresses as Go's package `net` reads them, with its words for those that are wrong.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use super::forwarder::Kind;

/// How long the host's resolver may take for the name of a listener.
const LOOKUP_PATIENCE: Duration = Duration::from_secs(5);

/// Takes `HOST:PORT` apart as Go's `net.SplitHostPort` does; either may be empty.
///
/// # Errors
/// Its words.
pub(super) fn split(text: &str) -> Result<(&str, &str), String> {
    let wrong = |why: &str| match text {
        "" => why.to_owned(),
        text => format!("address {text}: {why}"),
    };
    let missing = || wrong("missing port in address");
    let colon = text.rfind(':').ok_or_else(missing)?;
    let (host, after) = match text.strip_prefix('[') {
        Some(rest) => {
            let end = rest.find(']').ok_or_else(|| wrong("missing ']' in address"))?;
            match &rest[end + 1..] {
                "" => return Err(missing()),
                port if end + 2 == colon && port.starts_with(':') => (&rest[..end], port),
                port if port.starts_with(':') => return Err(wrong("too many colons in address")),
                _ => return Err(missing()),
            }
        }
        None if text[..colon].contains(':') => return Err(wrong("too many colons in address")),
        None => (&text[..colon], text),
    };
    let bracket = |in_text: &str, bracket: char| in_text.contains(bracket);
    if bracket(host, '[') || bracket(&text[colon..], '[') {
        return Err(wrong("unexpected '[' in address"));
    }
    if bracket(after, ']') {
        return Err(wrong("unexpected ']' in address"));
    }
    Ok((host, &text[colon + 1..]))
}

/// Where a forward is to listen: the addresses, and how Go writes the place in what it says of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Listen {
    /// Where it must listen.
    pub(super) at: SocketAddr,
    /// Where it listens too, where that can be: a listener without a host is one of both families.
    pub(super) also: Option<SocketAddr>,
    /// No host was given.
    pub(super) is_any_address: bool,
    /// As `127.0.0.1:80`, or `:80` without a host.
    pub(super) shown: String,
}

/// Reads where a forward of TCP or UDP is to listen. Names are looked up by the host's resolver if `by_name`.
///
/// # Errors
/// What Go says when it listens there.
pub(super) async fn listen(kind: Kind, local: &str, by_name: bool) -> Result<Listen, String> {
    let network = kind.word();
    // UDP's address is resolved before, and so told without what was to be done with it.
    let wrong = |why: String| match kind {
        Kind::Udp => why,
        _ => format!("listen {network}: {why}"),
    };
    let (host, port) = split(local).map_err(wrong)?;
    let port = port_of(network, port).map_err(wrong)?;
    if host.is_empty() {
        return Ok(Listen {
            at: (Ipv4Addr::UNSPECIFIED, port).into(),
            also: has_ipv6().then_some((Ipv6Addr::UNSPECIFIED, port).into()),
            is_any_address: true,
            shown: format!(":{port}"),
        });
    }
    let address = match host.parse::<IpAddr>() {
        Ok(address) => address,
        Err(_) if host == "localhost" => Ipv4Addr::LOCALHOST.into(),
        Err(_) if by_name => look_up(host)
            .await
            .ok_or_else(|| wrong(format!("lookup {host}: no such host")))?,
        Err(_) => return Err(wrong(format!("lookup {host}: no such host"))),
    };
    let at = SocketAddr::new(address, port);
    Ok(Listen {
        at,
        also: None,
        is_any_address: false,
        shown: at.to_string(),
    })
}

/// Whether this host has IPv6 at all.
pub fn has_ipv6() -> bool {
    std::net::UdpSocket::bind((Ipv6Addr::LOCALHOST, 0)).is_ok()
}

/// The first address of a name, of IPv4 if it has one, as Go listens at.
async fn look_up(host: &str) -> Option<IpAddr> {
    let found = tokio::time::timeout(LOOKUP_PATIENCE, tokio::net::lookup_host((host, 0)));
    let addresses: Vec<SocketAddr> = found.await.ok()?.ok()?.collect();
    let first = addresses.iter().find(|address| address.is_ipv4());
    Some(first.or(addresses.first())?.ip())
}

fn port_of(network: &str, port: &str) -> Result<u16, String> {
    if port.is_empty() {
        return Ok(0);
    }
    if port
        .strip_prefix(['+', '-'])
        .unwrap_or(port)
        .bytes()
        .all(|b| b.is_ascii_digit())
    {
        return port.parse().map_err(|_| format!("address {port}: invalid port"));
    }
    Err(format!("lookup {network}/{port}: unknown port"))
}

/// A number of 16 bits as Go's `strconv.ParseUint` reads it.
///
/// # Errors
/// Its words.
pub(super) fn port_number(text: &str) -> Result<u16, String> {
    let wrong = |why: &str| format!("strconv.ParseUint: parsing {}: {why}", quoted(text));
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(wrong("invalid syntax"));
    }
    text.parse().map_err(|_| wrong("value out of range"))
}

/// A text in quotes, as Go's `%q` has it for what is plain.
pub(super) fn quoted(text: &str) -> String {
    format!("{text:?}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_and_ports_are_taken_apart_as_go_does() {
        let right = [
            ("127.0.0.1:80", ("127.0.0.1", "80")),
            (":6443", ("", "6443")),
            ("[::1]:80", ("::1", "80")),
            ("[fe80::1%eth0]:80", ("fe80::1%eth0", "80")),
            ("host:", ("host", "")),
            ("[]:80", ("", "80")),
        ];
        for (text, expected) in right {
            assert_eq!(split(text), Ok(expected), "{text}");
        }
        let wrong = [
            ("foo", "address foo: missing port in address"),
            ("", "missing port in address"),
            ("@", "address @: missing port in address"),
            ("::1:80", "address ::1:80: too many colons in address"),
            ("[::1]", "address [::1]: missing port in address"),
            ("[::1", "address [::1: missing ']' in address"),
            ("[::1]:80:1", "address [::1]:80:1: too many colons in address"),
            ("[::1]x:80", "address [::1]x:80: missing port in address"),
            ("[[::1]:80", "address [[::1]:80: unexpected '[' in address"),
            ("a]:80", "address a]:80: unexpected ']' in address"),
            ("a:[80", "address a:[80: unexpected '[' in address"),
            ("[a]:8]0", "address [a]:8]0: unexpected ']' in address"),
        ];
        for (text, expected) in wrong {
            assert_eq!(split(text), Err(expected.to_owned()), "{text}");
        }
    }

    #[tokio::test]
    async fn places_to_listen_are_told_as_go_tells_them() {
        let tcp = |local| listen(Kind::Tcp, local, false);
        let all = tcp(":6443").await.unwrap();
        assert_eq!(all.at, "0.0.0.0:6443".parse().unwrap());
        assert_eq!(all.also, Some("[::]:6443".parse().unwrap()));
        assert_eq!((all.shown.as_str(), all.is_any_address), (":6443", true));
        assert!(!tcp("0.0.0.0:6443").await.unwrap().is_any_address);
        assert_eq!(tcp("localhost:80").await.unwrap().shown, "127.0.0.1:80");
        assert_eq!(tcp("[::1]:0").await.unwrap().at, "[::1]:0".parse().unwrap());
        let wrong = [
            ("foo", "listen tcp: address foo: missing port in address"),
            ("127.0.0.1:99999", "listen tcp: address 99999: invalid port"),
            ("127.0.0.1:-1", "listen tcp: address -1: invalid port"),
            ("127.0.0.1:web!", "listen tcp: lookup tcp/web!: unknown port"),
            (
                "nowhere.invalid:80",
                "listen tcp: lookup nowhere.invalid: no such host",
            ),
        ];
        for (local, expected) in wrong {
            assert_eq!(tcp(local).await, Err(expected.to_owned()), "{local}");
        }
        assert_eq!(
            listen(Kind::Udp, "foo", false).await,
            Err("address foo: missing port in address".to_owned())
        );
    }

    #[test]
    fn ports_are_numbers_as_go_parses_them() {
        assert_eq!(port_number("65535"), Ok(65535));
        let wrong = [
            ("", r#"strconv.ParseUint: parsing "": invalid syntax"#),
            ("http", r#"strconv.ParseUint: parsing "http": invalid syntax"#),
            (
                "65536",
                r#"strconv.ParseUint: parsing "65536": value out of range"#,
            ),
            ("+1", r#"strconv.ParseUint: parsing "+1": invalid syntax"#),
        ];
        for (text, expected) in wrong {
            assert_eq!(port_number(text), Err(expected.to_owned()), "{text}");
        }
    }
}
