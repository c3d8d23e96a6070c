//! The messages of neighbour discovery (RFC 4861) as a router reads and writes them, and what a router
//! advertises of DNS (RFC 8106). Who may say them, and what follows, is [`crate::engine::discovery`]'s.
//!
//! What the guest meets: a router at `fe80::1` that advertises one prefix for addresses of the guest's own
//! making (SLAAC, RFC 4862), the MTU, and itself as the resolver; a lifetime as a default router only while
//! the host itself has a way out.

use std::net::{IpAddr, Ipv6Addr};
use std::time::Duration;

use ipnet::Ipv6Net;
use vnet_proto::model::Name;

use crate::engine::frame::DropReason;
use crate::engine::ip::{IPV6_BYTES, Ip};
use crate::engine::reply::ON_LINK_HOPS;
use crate::mac::Mac;

/// The gateway's address on every link.
pub const LINK_LOCAL: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
/// Every node of a link (RFC 4291 §2.7.1).
pub const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
/// How long addresses of the prefix are valid, from each advertisement on (RFC 4861 §6.2.1's default).
pub const PREFIX_VALID: Duration = Duration::from_secs(2_592_000);
/// How long they are preferred (the same).
pub const PREFIX_PREFERRED: Duration = Duration::from_secs(604_800);
/// How long the gateway is a default router and a resolver, from each advertisement on. Three intervals are
/// the least that RFC 4861 §6.2.1 and RFC 8106 §5.1 advise.
pub const ROUTER_LIFETIME: Duration = Duration::from_secs(1_800);

const ROUTER_SOLICITATION: u8 = 133;
const ROUTER_ADVERTISEMENT: u8 = 134;
const NEIGHBOUR_SOLICITATION: u8 = 135;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
const REDIRECT: u8 = 137;

const SOURCE_LINK_ADDRESS: u8 = 1;
const TARGET_LINK_ADDRESS: u8 = 2;
const PREFIX_INFORMATION: u8 = 3;
const MTU: u8 = 5;
const RECURSIVE_DNS_SERVER: u8 = 25;
const DNS_SEARCH_LIST: u8 = 31;

/// The fixed part of a solicitation or advertisement of a neighbour, bytes.
const NEIGHBOUR_BYTES: usize = 24;
/// The fixed part of a router solicitation, bytes.
const SOLICITATION_BYTES: usize = 8;

/// A message from a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Message {
    /// Which routers are there?
    RouterSolicitation {
        /// The sender's MAC address, as it says.
        mac: Option<Mac>,
    },
    /// Who has an address?
    NeighbourSolicitation {
        /// The address.
        target: Ipv6Addr,
        /// The sender's MAC address, as it says.
        mac: Option<Mac>,
    },
    /// I have an address.
    NeighbourAdvertisement {
        /// The address.
        target: Ipv6Addr,
        /// Its MAC address, as it says.
        mac: Option<Mac>,
    },
    /// What only a router says: an advertisement of one, or a redirect.
    Router,
}

/// Whether a packet is a message of neighbour discovery. One that came in fragments, even one, is none that
/// may be listened to (RFC 6980 §5).
pub fn is_discovery(ip: &Ip<'_>) -> bool {
    ip.destination.is_ipv6()
        && ip.protocol == crate::engine::reply::ICMPV6
        && !ip.is_fragment()
        && ip
            .payload()
            .first()
            .is_some_and(|kind| (ROUTER_SOLICITATION..=REDIRECT).contains(kind))
}

/// Reads a message that [`is_discovery`], and checks it as RFC 4861 §6.1.1, §7.1.1 and §7.1.2 say.
///
/// # Errors
/// [`DropReason::Malformed`].
pub fn parse(ip: &Ip<'_>) -> Result<Message, DropReason> {
    let bytes = ip.payload();
    // Right behind the base header: nothing honest stands in between, and a fragment header must not.
    let sound = ip.hop_limit == ON_LINK_HOPS
        && usize::from(ip.header_bytes) == IPV6_BYTES
        && bytes.get(1) == Some(&0);
    if !sound {
        return Err(DropReason::Malformed);
    }
    match bytes[0] {
        ROUTER_SOLICITATION => {
            let mac = option(bytes, SOLICITATION_BYTES, SOURCE_LINK_ADDRESS)?;
            if mac.is_some() && is_unspecified(ip.source) {
                return Err(DropReason::Malformed);
            }
            Ok(Message::RouterSolicitation { mac })
        }
        NEIGHBOUR_SOLICITATION => {
            let target = target(bytes)?;
            let mac = option(bytes, NEIGHBOUR_BYTES, SOURCE_LINK_ADDRESS)?;
            let probe = is_unspecified(ip.source);
            if probe && (mac.is_some() || ip.destination != solicited_node(target)) {
                return Err(DropReason::Malformed);
            }
            Ok(Message::NeighbourSolicitation { target, mac })
        }
        NEIGHBOUR_ADVERTISEMENT => {
            let target = target(bytes)?;
            let mac = option(bytes, NEIGHBOUR_BYTES, TARGET_LINK_ADDRESS)?;
            // Nobody has asked all nodes for an answer.
            let solicited = bytes[4] & 0x40 != 0;
            if solicited && matches!(ip.destination, IpAddr::V6(to) if to.is_multicast()) {
                return Err(DropReason::Malformed);
            }
            Ok(Message::NeighbourAdvertisement { target, mac })
        }
        _ => Ok(Message::Router),
    }
}

/// Writes that `mac` has `target`: the gateway's word, which overrides. Its checksum is left open.
pub fn advertisement(target: Ipv6Addr, mac: Mac, is_router: bool, is_answer: bool) -> Vec<u8> {
    const OVERRIDE: u8 = 0x20;
    let flags = OVERRIDE | if is_router { 0x80 } else { 0 } | if is_answer { 0x40 } else { 0 };
    let mut message = vec![NEIGHBOUR_ADVERTISEMENT, 0, 0, 0, flags, 0, 0, 0];
    message.extend_from_slice(&target.octets());
    message.extend_from_slice(&[TARGET_LINK_ADDRESS, 1]);
    message.extend_from_slice(&mac.0);
    message
}

/// What the gateway advertises of itself.
#[derive(Debug, Clone, Copy)]
pub struct Router<'a> {
    /// Its MAC address.
    pub mac: Mac,
    /// The prefix that guests make addresses of.
    pub prefix: Ipv6Net,
    /// The resolver.
    pub resolver: Ipv6Addr,
    /// Search domains.
    pub search: &'a [Name],
    /// The link's MTU, bytes.
    pub mtu_bytes: usize,
    /// Whether it is a way out.
    pub is_default: bool,
}

impl Router<'_> {
    /// Writes a router advertisement (RFC 4861 §4.2). Its checksum is left open.
    pub fn advertisement(&self) -> Vec<u8> {
        const HOP_LIMIT: u8 = 64;
        let lifetime = if self.is_default {
            ROUTER_LIFETIME
        } else {
            Duration::ZERO
        };
        let mut message = vec![ROUTER_ADVERTISEMENT, 0, 0, 0, HOP_LIMIT, 0];
        message.extend_from_slice(
            &u16::try_from(lifetime.as_secs())
                .unwrap_or(u16::MAX)
                .to_be_bytes(),
        );
        // Reachable time and retransmission timer: unspecified.
        message.extend_from_slice(&[0; 8]);

        message.extend_from_slice(&[SOURCE_LINK_ADDRESS, 1]);
        message.extend_from_slice(&self.mac.0);

        message.extend_from_slice(&[MTU, 1, 0, 0]);
        let mtu = u32::try_from(self.mtu_bytes).unwrap_or(u32::MAX);
        message.extend_from_slice(&mtu.to_be_bytes());

        const ON_LINK_AND_AUTONOMOUS: u8 = 0xc0;
        message.extend_from_slice(&[
            PREFIX_INFORMATION,
            4,
            self.prefix.prefix_len(),
            ON_LINK_AND_AUTONOMOUS,
        ]);
        message.extend_from_slice(&seconds(PREFIX_VALID));
        message.extend_from_slice(&seconds(PREFIX_PREFERRED));
        message.extend_from_slice(&[0; 4]);
        message.extend_from_slice(&self.prefix.network().octets());

        message.extend_from_slice(&[RECURSIVE_DNS_SERVER, 3, 0, 0]);
        message.extend_from_slice(&seconds(ROUTER_LIFETIME));
        message.extend_from_slice(&self.resolver.octets());

        self.write_search(&mut message);
        message
    }

    /// The search list (RFC 8106 §5.2), as far as one option has room: 2,032 bytes.
    fn write_search(&self, message: &mut Vec<u8>) {
        let mut names = Vec::new();
        for name in self.search {
            let mut wire = Vec::new();
            for label in name.as_str().split('.') {
                // A name of flags is one that a person typed: its labels are letters, digits and hyphens.
                let Ok(length) = u8::try_from(label.len()) else {
                    return;
                };
                wire.push(length);
                wire.extend_from_slice(label.as_bytes());
            }
            wire.push(0);
            names.extend_from_slice(&wire);
        }
        let units = (8 + names.len()).div_ceil(8);
        let Ok(length) = u8::try_from(units) else { return };
        if names.is_empty() {
            return;
        }
        let start = message.len();
        message.extend_from_slice(&[DNS_SEARCH_LIST, length, 0, 0]);
        message.extend_from_slice(&seconds(ROUTER_LIFETIME));
        message.extend_from_slice(&names);
        message.resize(start + units * 8, 0);
    }
}

/// Where a solicitation of an address is sent to (RFC 4291 §2.7.1).
pub fn solicited_node(address: Ipv6Addr) -> Ipv6Addr {
    let [.., high, low] = address.segments();
    Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00 | (high & 0xff), low)
}

fn target(bytes: &[u8]) -> Result<Ipv6Addr, DropReason> {
    let octets: [u8; 16] = bytes
        .get(8..NEIGHBOUR_BYTES)
        .and_then(|bytes| bytes.try_into().ok())
        .ok_or(DropReason::Malformed)?;
    let target = Ipv6Addr::from(octets);
    if target.is_multicast() || target.is_unspecified() {
        return Err(DropReason::Malformed);
    }
    Ok(target)
}

/// The MAC address in an option of a kind, if there is one; every option must have a length (RFC 4861 §4.6).
fn option(bytes: &[u8], from: usize, kind: u8) -> Result<Option<Mac>, DropReason> {
    let mut rest = bytes.get(from..).ok_or(DropReason::Malformed)?;
    let mut found = None;
    while let Some((header, _)) = rest.split_first_chunk::<2>() {
        let length = usize::from(header[1]) * 8;
        let Some((option, after)) = rest.split_at_checked(length).filter(|_| length != 0) else {
            return Err(DropReason::Malformed);
        };
        if header[0] == kind {
            let octets: [u8; 6] = option[2..8].try_into().map_err(|_| DropReason::Malformed)?;
            found = Some(Mac(octets));
        }
        rest = after;
    }
    if rest.is_empty() {
        Ok(found)
    } else {
        Err(DropReason::Malformed)
    }
}

fn is_unspecified(address: IpAddr) -> bool {
    address.is_unspecified()
}

fn seconds(time: Duration) -> [u8; 4] {
    u32::try_from(time.as_secs()).unwrap_or(u32::MAX).to_be_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: Mac = Mac([2, 0, 0, 0, 0, 2]);

    fn packet(source: &str, destination: &str, hops: u8, message: &[u8]) -> Vec<u8> {
        let mut packet = vec![0x60, 0, 0, 0, 0, message.len() as u8, 58, hops];
        packet.extend_from_slice(&source.parse::<Ipv6Addr>().unwrap().octets());
        packet.extend_from_slice(&destination.parse::<Ipv6Addr>().unwrap().octets());
        packet.extend_from_slice(message);
        packet
    }

    fn solicitation(target: &str, option: &[u8]) -> Vec<u8> {
        let mut message = vec![135, 0, 0, 0, 0, 0, 0, 0];
        message.extend_from_slice(&target.parse::<Ipv6Addr>().unwrap().octets());
        message.extend_from_slice(option);
        message
    }

    fn read(packet: &[u8]) -> Result<Message, DropReason> {
        let ip = Ip::parse(packet).unwrap();
        assert!(is_discovery(&ip));
        parse(&ip)
    }

    #[test]
    fn solicitations_are_read_and_checked() {
        let with_mac = [&[1u8, 1][..], &MAC.0].concat();
        let target: Ipv6Addr = "fd00::1".parse().unwrap();
        assert_eq!(
            read(&packet(
                "fd00::2",
                "ff02::1:ff00:1",
                255,
                &solicitation("fd00::1", &with_mac)
            )),
            Ok(Message::NeighbourSolicitation {
                target,
                mac: Some(MAC)
            })
        );
        assert_eq!(
            read(&packet(
                "::",
                "ff02::1:ff00:1",
                255,
                &solicitation("fd00::1", &[])
            )),
            Ok(Message::NeighbourSolicitation { target, mac: None })
        );
        let nonce = [14u8, 1, 1, 2, 3, 4, 5, 6];
        assert!(
            read(&packet(
                "::",
                "ff02::1:ff00:1",
                255,
                &solicitation("fd00::1", &nonce)
            ))
            .is_ok()
        );
        for (what, bytes) in [
            (
                "from beyond a router",
                packet("fd00::2", "fd00::1", 254, &solicitation("fd00::1", &[])),
            ),
            (
                "a probe with an address",
                packet("::", "ff02::1:ff00:1", 255, &solicitation("fd00::1", &with_mac)),
            ),
            (
                "a probe to one",
                packet("::", "fd00::1", 255, &solicitation("fd00::1", &[])),
            ),
            (
                "for a group",
                packet("fd00::2", "fd00::1", 255, &solicitation("ff02::1", &[])),
            ),
            (
                "cut short",
                packet("fd00::2", "fd00::1", 255, &solicitation("fd00::1", &[])[..20]),
            ),
            (
                "an option of no length",
                packet(
                    "fd00::2",
                    "fd00::1",
                    255,
                    &solicitation("fd00::1", &[1, 0, 0, 0, 0, 0, 0, 0]),
                ),
            ),
            (
                "an option too long",
                packet(
                    "fd00::2",
                    "fd00::1",
                    255,
                    &solicitation("fd00::1", &[1, 2, 0, 0, 0, 0, 0, 0]),
                ),
            ),
            (
                "half an option",
                packet("fd00::2", "fd00::1", 255, &solicitation("fd00::1", &[1])),
            ),
            ("a code", {
                let mut message = solicitation("fd00::1", &[]);
                message[1] = 1;
                packet("fd00::2", "fd00::1", 255, &message)
            }),
        ] {
            assert_eq!(read(&bytes), Err(DropReason::Malformed), "{what}");
        }
    }

    #[test]
    fn what_only_routers_say_is_known_as_such() {
        for kind in [134, 137] {
            assert_eq!(
                read(&packet("fe80::2", "ff02::1", 255, &[kind, 0, 0, 0])),
                Ok(Message::Router)
            );
        }
        let answer = advertisement("fd00::9".parse().unwrap(), MAC, false, true);
        assert_eq!(
            read(&packet("fd00::9", "ff02::1", 255, &answer)),
            Err(DropReason::Malformed),
            "an answer to everybody"
        );
        assert!(matches!(
            read(&packet("fd00::9", "fe80::1", 255, &answer)),
            Ok(Message::NeighbourAdvertisement { mac: Some(MAC), .. })
        ));
    }

    #[test]
    fn a_router_advertises_prefix_mtu_and_resolver() {
        let search = ["example.com".parse().unwrap(), "lab.test".parse().unwrap()];
        let router = Router {
            mac: MAC,
            prefix: "fd00::/64".parse().unwrap(),
            resolver: "fd00::1".parse().unwrap(),
            search: &search,
            mtu_bytes: 1500,
            is_default: true,
        };
        let message = router.advertisement();
        assert_eq!(message.len() % 8, 0);
        assert_eq!(message[..8], [134, 0, 0, 0, 64, 0, 0x07, 0x08]);
        let mut options = Vec::new();
        let mut rest = &message[16..];
        while !rest.is_empty() {
            let (option, after) = rest.split_at(usize::from(rest[1]) * 8);
            options.push(option);
            rest = after;
        }
        let kinds: Vec<u8> = options.iter().map(|o| o[0]).collect();
        assert_eq!(kinds, [1, 5, 3, 25, 31]);
        assert_eq!(options[0][2..], MAC.0);
        assert_eq!(options[1][4..], [0, 0, 5, 220]);
        assert_eq!(options[2][2..4], [64, 0xc0]);
        assert_eq!(options[2][16..], "fd00::".parse::<Ipv6Addr>().unwrap().octets());
        assert_eq!(options[3][8..], "fd00::1".parse::<Ipv6Addr>().unwrap().octets());
        assert!(options[4][8..].starts_with(b"\x07example\x03com\x00\x03lab\x04test\x00\x00"));

        let without = Router {
            is_default: false,
            search: &[],
            ..router
        };
        let message = without.advertisement();
        assert_eq!(message[6..8], [0, 0], "no default router");
        assert_eq!(message.len(), 16 + 8 + 8 + 32 + 24);
    }
}
