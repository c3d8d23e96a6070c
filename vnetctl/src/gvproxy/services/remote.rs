//! Where what is exposed leads: an address in the network, or, of a Unix socket, a URL.

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};

use super::address::{port_number, quoted, split};
use super::answer::Answer;
use crate::gvproxy::ssh::redacted;

/// Where a Unix socket leads.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum UnixRemote {
    /// To an address in the network.
    Tcp(SocketAddr),
    /// To a Unix socket of the guest, over SSH; who serves that reads the URL.
    Ssh,
}

/// The text of where TCP or UDP leads, with the caller's own address where it has no host.
///
/// # Errors
/// gvproxy's words, as an answer.
pub(super) fn with_caller(remote: &str, caller: Option<std::net::IpAddr>) -> Result<String, Answer> {
    let (host, _) = split(remote).map_err(Answer::bad_request)?;
    match (host, caller) {
        ("", Some(caller)) => Ok(format!("{caller}{remote}")),
        // A Unix socket's client has no address.
        ("", None) => Err(Answer::bad_request("address @: missing port in address")
            .with_remedy("write the guest's address before the port, as 192.168.127.2:80")),
        _ => Ok(remote.to_owned()),
    }
}

/// An address in the network.
///
/// # Errors
/// gvproxy's words, as an answer; where it panics, one of our own.
pub(super) fn address(remote: &str) -> Result<SocketAddr, Answer> {
    let (host, port) = match remote.split_once(':') {
        Some((host, port)) if !port.contains(':') => (host, port),
        _ => {
            return Err(Answer::failed("invalid remote addr")
                .with_remedy("write an IPv4 address and a port, as 192.168.127.2:80"));
        }
    };
    let port = port_number(port).map_err(Answer::failed)?;
    let host: Ipv4Addr = host.parse().map_err(|_| {
        Answer::bad_request(format!("{} is not an IPv4 address", quoted(host)))
            .with_remedy("names are not looked up here: write the guest's address")
    })?;
    if port == 0 {
        return Err(Answer::bad_request("port 0 of the remote address leads nowhere"));
    }
    Ok(SocketAddrV4::new(host, port).into())
}

/// Where a Unix socket (or a named pipe) is to lead.
///
/// # Errors
/// gvproxy's words, as an answer.
pub(super) fn of_unix(remote: &str) -> Result<UnixRemote, Answer> {
    let url = redacted(remote);
    let unreadable = |why: &str| {
        Answer::failed(format!(
            "failed to parse remote uri :{url} : parse {}: {why}",
            quoted(&url)
        ))
        .with_remedy(
            "write tcp://192.168.127.2:80, or ssh-tunnel://user@192.168.127.2/path/of/socket?key=FILE",
        )
    };
    match scheme_of(remote)
        .map_err(unreadable)?
        .to_ascii_lowercase()
        .as_str()
    {
        "ssh-tunnel" => Ok(UnixRemote::Ssh),
        "tcp" => address(&authority(remote)).map(UnixRemote::Tcp),
        other => {
            let text = format!("remote protocol for unix forwarder is not implemented: {other}");
            Err(Answer::failed(text).with_remedy("tcp and ssh-tunnel are"))
        }
    }
}

/// The host and port of a URL, with a colon between them whether there is a port or not.
fn authority(url: &str) -> String {
    let rest = url.split_once("://").map_or("", |(_, rest)| rest);
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    let place = &rest[..end];
    let place = place.rsplit_once('@').map_or(place, |(_, place)| place);
    if place.contains(':') {
        place.to_owned()
    } else {
        format!("{place}:")
    }
}

/// The scheme of a URL as Go's `url.Parse` finds it; empty where it has none.
fn scheme_of(text: &str) -> Result<&str, &'static str> {
    for (index, byte) in text.bytes().enumerate() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' => {}
            b'0'..=b'9' | b'+' | b'-' | b'.' if index > 0 => {}
            b':' if index == 0 => return Err("missing protocol scheme"),
            b':' => return Ok(&text[..index]),
            _ => break,
        }
    }
    let segment = text.split('/').next().unwrap_or_default();
    if segment.contains(':') {
        return Err("first path segment in URL cannot contain colon");
    }
    Ok("")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal<T: std::fmt::Debug>(result: Result<T, Answer>) -> String {
        result.unwrap_err().text().to_owned()
    }

    #[test]
    fn the_callers_address_stands_for_a_host_that_is_left_out() {
        let caller = Some("192.168.127.2".parse().unwrap());
        assert_eq!(with_caller(":8080", caller).unwrap(), "192.168.127.2:8080");
        assert_eq!(with_caller("192.168.127.3:1", caller).unwrap(), "192.168.127.3:1");
        assert_eq!(
            refusal(with_caller(":8080", None)),
            "address @: missing port in address"
        );
        assert_eq!(
            refusal(with_caller("foo", None)),
            "address foo: missing port in address"
        );
    }

    #[test]
    fn addresses_in_the_network_are_read_as_gvproxy_does_and_names_do_no_harm() {
        assert_eq!(
            address("192.168.127.2:80").unwrap(),
            "192.168.127.2:80".parse().unwrap()
        );
        let wrong = [
            ("[fd00::2]:80", "invalid remote addr"),
            ("foo", "invalid remote addr"),
            (
                "192.168.127.2:http",
                r#"strconv.ParseUint: parsing "http": invalid syntax"#,
            ),
            (
                "192.168.127.2:65536",
                r#"strconv.ParseUint: parsing "65536": value out of range"#,
            ),
            ("web:80", r#""web" is not an IPv4 address"#),
            ("192.168.127.2:0", "port 0 of the remote address leads nowhere"),
        ];
        for (remote, expected) in wrong {
            assert_eq!(refusal(address(remote)), expected, "{remote}");
        }
    }

    #[test]
    fn remotes_of_unix_sockets_are_urls() {
        let tcp = UnixRemote::Tcp("192.168.127.2:80".parse().unwrap());
        for remote in ["tcp://192.168.127.2:80", "TCP://a@192.168.127.2:80/path?x#y"] {
            assert_eq!(of_unix(remote).unwrap(), tcp, "{remote}");
        }
        assert_eq!(of_unix("ssh-tunnel://a@b/s?key=k").unwrap(), UnixRemote::Ssh);
        let wrong = [
            (
                "udp://192.168.127.2:53",
                "remote protocol for unix forwarder is not implemented: udp",
            ),
            (
                "/run/b.sock",
                "remote protocol for unix forwarder is not implemented: ",
            ),
            (
                "192.168.127.2:80",
                "failed to parse remote uri :192.168.127.2:80 : parse \"192.168.127.2:80\": \
                 first path segment in URL cannot contain colon",
            ),
            (
                ":80",
                "failed to parse remote uri ::80 : parse \":80\": missing protocol scheme",
            ),
            (
                "tcp://192.168.127.2",
                r#"strconv.ParseUint: parsing "": invalid syntax"#,
            ),
            ("tcp://web:80", r#""web" is not an IPv4 address"#),
            (
                "tcp:192.168.127.2:80",
                r#"strconv.ParseUint: parsing "": invalid syntax"#,
            ),
            ("tcp://[::1]:80", "invalid remote addr"),
        ];
        for (remote, expected) in wrong {
            assert_eq!(refusal(of_unix(remote)), expected, "{remote}");
        }
    }

    #[test]
    fn secrets_are_not_shown() {
        let said = refusal(of_unix("ssh tunnel://a:secret@b/s?pass%70hrase=secret"));
        assert!(!said.contains("secret") && said.contains("xxxxx"), "{said}");
    }
}
