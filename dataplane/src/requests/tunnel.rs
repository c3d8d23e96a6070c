//! Where a tunnel leads, by the parameters of its request: read once, for this socket and for the front's own. Pure.
//!
//! Go's reading of parameters and of numbers, and its words for what is none.

use std::net::{IpAddr, SocketAddr};

/// Of what a client said, so much is said back.
const SAID_BYTES_MAX: usize = 64;

/// Where the query of a `/tunnel` says that it leads: `ip` is an address of either family, and `port` a number. IPv4 in
/// IPv6's spelling is IPv4, as the peer reads it.
///
/// # Errors
/// What is wrong, in the peer's words where it has any.
pub fn tunnel_target(query: &str) -> Result<SocketAddr, String> {
    let ip = parameter(query, "ip").unwrap_or_default();
    if ip.is_empty() {
        return Err("ip is mandatory".to_owned());
    }
    let port = parameter(query, "port").unwrap_or_default();
    let port = port_number(&port)
        .map_err(|why| format!("strconv.ParseUint: parsing \"{}\": {why}", printable(&port)))?;
    let address = std::str::from_utf8(&ip)
        .ok()
        .and_then(|ip| ip.parse::<IpAddr>().ok());
    let Some(address) = address else {
        let ip = printable(&ip);
        return Err(format!(
            "ip {ip} is not an address (expected one in the network, as 192.168.127.2)"
        ));
    };
    if port == 0 {
        return Err("port 0 is out of range (expected 1 to 65535)".to_owned());
    }
    Ok(SocketAddr::new(address.to_canonical(), port))
}

/// A number as Go's strconv.ParseUint reads it, and its words for what is none.
fn port_number(text: &[u8]) -> Result<u16, &'static str> {
    if text.is_empty() || !text.iter().all(u8::is_ascii_digit) {
        return Err("invalid syntax");
    }
    std::str::from_utf8(text)
        .ok()
        .and_then(|text| text.parse().ok())
        .ok_or("value out of range")
}

/// The first value of a parameter. As in Go, what is not well encoded, or has a semicolon, is none.
fn parameter(query: &str, wanted: &str) -> Option<Vec<u8>> {
    query
        .split('&')
        .filter(|pair| !pair.contains(';'))
        .find_map(|pair| {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            let is_wanted = decode(key, true)? == wanted.as_bytes();
            is_wanted.then(|| decode(value, true)).flatten()
        })
}

/// Percent-decoding; `None` where a `%` has no two digits behind it.
pub(super) fn decode(text: &str, plus_is_space: bool) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        rest = tail;
        bytes.push(match first {
            b'%' => {
                let digit = |at: usize| char::from(*tail.get(at)?).to_digit(16);
                rest = tail.get(2..)?;
                u8::try_from(digit(0)? * 16 + digit(1)?).ok()?
            }
            b'+' if plus_is_space => b' ',
            other => other,
        });
    }
    Some(bytes)
}

/// What a client said, for one line of an answer.
fn printable(bytes: &[u8]) -> String {
    let cut = &bytes[..bytes.len().min(SAID_BYTES_MAX)];
    cut.escape_ascii().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tunnel_has_the_address_and_port_of_its_parameters() {
        for (query, expected) in [
            ("ip=192.168.127.2&port=22", "192.168.127.2:22"),
            ("port=022&x&ip=192.168.127.%32&ip=1.1.1.1", "192.168.127.2:22"),
            ("ip=%31%39%32.168.127.2&port=22", "192.168.127.2:22"),
            ("ip=::ffff:192.168.127.2&port=22", "192.168.127.2:22"),
            ("ip=fd00%3A%3A2&port=65535", "[fd00::2]:65535"),
        ] {
            assert_eq!(tunnel_target(query), Ok(expected.parse().unwrap()), "{query}");
        }
    }

    #[test]
    fn wrong_parameters_are_answered_in_the_peers_words() {
        let number = |text: &str, why: &str| format!("strconv.ParseUint: parsing \"{text}\": {why}");
        let syntax = |text: &str| number(text, "invalid syntax");
        let range = |text: &str| number(text, "value out of range");
        let no_ip = || "ip is mandatory".to_owned();
        for (query, expected) in [
            ("", no_ip()),
            ("port=22", no_ip()),
            ("ip=a;b&port=22", no_ip()),
            ("ip=%zz&port=22", no_ip()),
            ("ip=1.2.3.4", syntax("")),
            // A port is read before what the address is.
            ("ip=web&port=ssh%0a", syntax("ssh\\n")),
            ("ip=1.2.3.4&port=-1", syntax("-1")),
            ("ip=1.2.3.4&port=%2B22", syntax("+22")),
            ("ip=1.2.3.4&port=65536", range("65536")),
            (
                "ip=1.2.3.4&port=99999999999999999999",
                range("99999999999999999999"),
            ),
            (
                "ip=1.2.3.4&port=0",
                "port 0 is out of range (expected 1 to 65535)".to_owned(),
            ),
            (
                "ip=gateway&port=22",
                "ip gateway is not an address (expected one in the network, as 192.168.127.2)".to_owned(),
            ),
        ] {
            assert_eq!(tunnel_target(query), Err(expected), "{query}");
        }
    }
}
