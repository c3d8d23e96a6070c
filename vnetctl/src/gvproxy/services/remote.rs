//! Where what is exposed leads: an address in the network, or, of a Unix socket, a URL.

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::path::PathBuf;

use hyper::StatusCode;
use url::Url;

use super::address::{port_number, quoted, split};
use super::answer::Answer;
use super::tunnel::SshTunnel;

/// The port of SSH where a URL has none.
const SSH_PORT: u16 = 22;

/// Where a Unix socket leads.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum UnixRemote {
    /// To an address in the network.
    Tcp(SocketAddr),
    /// To a Unix socket of the guest, over SSH.
    Ssh(SshTunnel),
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
pub(super) fn of_unix(local: &str, remote: &str) -> Result<UnixRemote, Answer> {
    let unreadable = |why: &str| {
        Answer::failed(format!(
            "failed to parse remote uri :{remote} : parse {}: {why}",
            quoted(remote)
        ))
        .with_remedy(
            "write tcp://192.168.127.2:80, or ssh-tunnel://user@192.168.127.2/path/of/socket?key=FILE",
        )
    };
    let scheme = scheme_of(remote).map_err(unreadable)?;
    if !matches!(scheme, "tcp" | "ssh-tunnel") {
        let text = format!("remote protocol for unix forwarder is not implemented: {scheme}");
        return Err(Answer::failed(text).with_remedy("tcp and ssh-tunnel are"));
    }
    let url = Url::parse(remote).map_err(|why| unreadable(&why.to_string()))?;
    if scheme == "tcp" {
        let port = url.port().map(|port| port.to_string()).unwrap_or_default();
        let host = url.host_str().unwrap_or_default();
        return address(&format!("{host}:{port}")).map(UnixRemote::Tcp);
    }
    let query = |name: &str| {
        let mut pairs = url.query_pairs();
        let pair = pairs.find(|(key, _)| key == name);
        pair.map(|(_, value)| value.into_owned()).unwrap_or_default()
    };
    let key = query("key");
    if key.is_empty() {
        return Err(Answer::failed("key not provided for unix-ssh connection")
            .with_remedy("add the private key's file to the remote: ?key=/path/of/key"));
    }
    if matches!(url.path(), "" | "/") {
        return Err(Answer::failed("remote uri must contain a path to a socket file"));
    }
    let decoded = |text: &str| -> Result<String, Answer> {
        let text = percent_encoding::percent_decode_str(text).decode_utf8();
        text.map(std::borrow::Cow::into_owned)
            .map_err(|_| Answer::error(StatusCode::BAD_REQUEST, "the remote is not UTF-8"))
    };
    let host = url.host_str().unwrap_or_default();
    let port = url.port().unwrap_or(SSH_PORT);
    let target = address(&format!("{host}:{port}"))?;
    let passphrase = Some(query("passphrase")).filter(|text| !text.is_empty());
    Ok(UnixRemote::Ssh(SshTunnel {
        socket: PathBuf::from(local),
        user: decoded(url.username())?,
        target,
        guest_socket: decoded(url.path())?,
        key: PathBuf::from(key),
        passphrase,
    }))
}

/// A remote as it may be shown: who lists what is exposed need not learn a passphrase.
pub(super) fn shown(remote: &str) -> String {
    const NAME: &str = "passphrase=";
    let Some(query) = remote.find('?') else {
        return remote.to_owned();
    };
    let (before, query) = remote.split_at(query + 1);
    let parts: Vec<String> = query
        .split('&')
        .map(|part| match part.strip_prefix(NAME) {
            Some(_) => format!("{NAME}***"),
            None => part.to_owned(),
        })
        .collect();
    format!("{before}{}", parts.join("&"))
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
        let of = |remote: &str| of_unix("/run/a.sock", remote);
        assert_eq!(
            of("tcp://192.168.127.2:80").unwrap(),
            UnixRemote::Tcp("192.168.127.2:80".parse().unwrap())
        );
        let ssh = of("ssh-tunnel://core@192.168.127.2:2222/run/pod%20man.sock?key=/k&passphrase=a%20b");
        assert_eq!(
            ssh.unwrap(),
            UnixRemote::Ssh(SshTunnel {
                socket: "/run/a.sock".into(),
                user: "core".to_owned(),
                target: "192.168.127.2:2222".parse().unwrap(),
                guest_socket: "/run/pod man.sock".to_owned(),
                key: "/k".into(),
                passphrase: Some("a b".to_owned()),
            })
        );
        let UnixRemote::Ssh(short) = of("ssh-tunnel://a@192.168.127.2/s?key=k").unwrap() else {
            panic!()
        };
        assert_eq!((short.target.port(), short.passphrase), (22, None));
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
                "ssh-tunnel://a@192.168.127.2/s",
                "key not provided for unix-ssh connection",
            ),
            (
                "ssh-tunnel://a@192.168.127.2?key=k",
                "remote uri must contain a path to a socket file",
            ),
        ];
        for (remote, expected) in wrong {
            assert_eq!(refusal(of(remote)), expected, "{remote}");
        }
    }

    #[test]
    fn a_passphrase_is_not_shown() {
        assert_eq!(
            shown("ssh-tunnel://a@b/s?key=k&passphrase=secret&x=1"),
            "ssh-tunnel://a@b/s?key=k&passphrase=***&x=1"
        );
        assert_eq!(shown("tcp://b:1"), "tcp://b:1");
    }
}
