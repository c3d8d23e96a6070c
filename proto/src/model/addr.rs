//! Addresses and prefixes: bytes inside the session, canonical text everywhere else.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::model::Malformed;
use crate::model::special::judged;

/// Reads an address of 4 or 16 bytes.
///
/// # Errors
/// [`Malformed::AddressLength`] for any other length.
pub fn address_from_bytes(field: &'static str, bytes: &[u8]) -> Result<IpAddr, Malformed> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        Ok(IpAddr::from(v4))
    } else if let Ok(v6) = <[u8; 16]>::try_from(bytes) {
        Ok(IpAddr::from(v6))
    } else {
        Err(Malformed::AddressLength {
            field,
            length: bytes.len(),
        })
    }
}

/// Writes an address as 4 or 16 bytes, network order.
pub fn address_to_bytes(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

/// Parses a prefix as a person types it: `10.0.0.0/8`, or one address for its /32 or /128. Bits
/// beyond the length must be zero, so that what is written is what is meant. A prefix of IPv4-mapped or
/// NAT64 addresses is refused: they are judged as the IPv4 addresses that they stand for
/// ([`judged`]), so that it would match nothing.
///
/// # Errors
/// One sentence that says what was expected.
pub fn parse_prefix(text: &str) -> Result<IpNet, String> {
    let net = match text.split_once('/') {
        None => text.parse::<IpAddr>().map(IpNet::from).map_err(|_| {
            format!("{text:?} is not an address or prefix (expected one as 192.0.2.7 or 10.0.0.0/8)")
        })?,
        Some((address, length)) => {
            let address: IpAddr = address.parse().map_err(|_| {
                format!("{address:?} is not an address (expected one as 10.0.0.0 in 10.0.0.0/8)")
            })?;
            let widest = if address.is_ipv4() { 32 } else { 128 };
            if length.is_empty() || !length.bytes().all(|b| b.is_ascii_digit()) {
                return Err(format!(
                    "prefix length {length:?} is not a number (expected 0 to {widest})"
                ));
            }
            let length: u8 = length.parse().ok().filter(|l| *l <= widest).ok_or_else(|| {
                format!("prefix length {length} is out of range for {address} (expected 0 to {widest})")
            })?;
            IpNet::new(address, length).map_err(|e| e.to_string())?
        }
    };
    if net.trunc() != net {
        return Err(format!(
            "{text} has bits set beyond its prefix length (did you mean {}?)",
            net.trunc()
        ));
    }
    if let IpNet::V6(v6) = net
        && v6.prefix_len() >= 96
        && let IpAddr::V4(meant) = judged(v6.addr().into())
    {
        let length = v6.prefix_len() - 96;
        return Err(format!(
            "{text} stands for IPv4 addresses, and is judged as those; write it as {meant}/{length}"
        ));
    }
    Ok(net)
}
