//! Addresses that are more than they seem: those that stand for another, and those that are nobody's public
//! ones. Both planes read these tables, so that what one guards the other knows.
//!
//! An IPv6 address may carry an IPv4 address that some translator, tunnel or the kernel would take a packet
//! to: IPv4-mapped (RFC 4291 §2.5.5.2), IPv4-compatible (§2.5.5.1), IPv4-translated (RFC 2765 §2.1), NAT64 (RFC 6052 §2.1), 6to4 (RFC 3056
//! §2). A rule about the IPv4 address must not be passed by in such a spelling. NAT64's well-known prefix is
//! in honest use (DNS64 hands it out), and what it leads to is one IPv4 address: it is **judged** as that
//! address, by every rule, grant, guard and name. The others no guest has an honest use for: a dataplane
//! refuses them ([`is_refused`]).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// The address as it is judged: the IPv4 address that an IPv4-mapped or NAT64 address stands for, else the
/// address itself.
pub fn judged(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => address,
        IpAddr::V6(v6) => match v6.segments() {
            [0, 0, 0, 0, 0, 0xffff, ..] | [0x64, 0xff9b, 0, 0, 0, 0, ..] => low_ipv4(v6).into(),
            _ => address,
        },
    }
}

/// The IPv4 address that an IPv6 address carries, in any of the spellings above.
pub fn carried_ipv4(address: Ipv6Addr) -> Option<Ipv4Addr> {
    match address.segments() {
        [0, 0, 0, 0, 0, 0, 0, 0 | 1] => None,
        [0, 0, 0, 0, 0, 0 | 0xffff, ..] | [0, 0, 0, 0, 0xffff, 0, ..] => Some(low_ipv4(address)),
        [0x64, 0xff9b, 0, 0, 0, 0, ..] => Some(low_ipv4(address)),
        [0x2002, ..] => {
            let [_, _, a, b, c, d, ..] = address.octets();
            Some(Ipv4Addr::new(a, b, c, d))
        }
        _ => None,
    }
}

/// Whether an address is none that a guest may send to, whatever a policy says. Of IPv4: "this host on this network",
/// loopback, multicast and reserved addresses (RFC 1122 §3.2.1.3, RFC 1112 §4). Of IPv6: unspecified, loopback,
/// multicast and link-local addresses lead nowhere beyond the link; the rest carry IPv4 addresses past the
/// rules for those (IPv4-mapped, IPv4-compatible, IPv4-translated, 6to4, Teredo of RFC 4380, local NAT64 of RFC 8215), or
/// are of a kind that is no more (site-local, RFC 3879).
pub fn is_refused(address: IpAddr) -> bool {
    let v6 = match address {
        IpAddr::V4(v4) => return matches!(v4.octets(), [0 | 127 | 224.., ..]),
        IpAddr::V6(v6) => v6,
    };
    match v6.segments() {
        [0, 0, 0, 0, 0, 0 | 0xffff, ..] | [0, 0, 0, 0, 0xffff, 0, ..] => true,
        [0x64, 0xff9b, 1, ..] | [0x2001, 0, ..] | [0x2002, ..] => true,
        // fe80::/10 and fec0::/10 together, multicast.
        [first, ..] => first & 0xff80 == 0xfe80 || first >= 0xff00,
    }
}

/// Whether an address is one that no name of the public DNS has a reason to stand for (RFC 6890 and its
/// registries): one of [`PRIVATE`], or an IPv6 address that carries such an IPv4 address. The networks for
/// documentation count as public: they are nobody's own.
pub fn is_private_or_special(address: IpAddr) -> bool {
    let address = judged(address);
    if PRIVATE.iter().any(|net| net.contains(&address)) {
        return true;
    }
    match address {
        IpAddr::V4(_) => false,
        IpAddr::V6(v6) => carried_ipv4(v6).is_some_and(|v4| is_private_or_special(v4.into())),
    }
}

/// Link-local (RFC 3927, RFC 4291 §2.5.6), and where clouds serve metadata outside it: Alibaba, Oracle,
/// Azure, Amazon over IPv6.
pub const METADATA: &[IpNet] = &[
    v4([169, 254, 0, 0], 16),
    v4([100, 100, 100, 200], 32),
    v4([192, 0, 0, 192], 32),
    v4([168, 63, 129, 16], 32),
    v6([0xfe80, 0, 0, 0, 0, 0, 0, 0], 10),
    v6([0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254], 128),
];

/// Where a kernel takes a connection to the host itself whatever its interfaces are: loopback, unspecified,
/// and all of 0.0.0.0/8, "this host on this network" (RFC 1122 §3.2.1.3, RFC 4291 §2.5).
pub const LOOPBACK: &[IpNet] = &[
    v4([0, 0, 0, 0], 8),
    v4([127, 0, 0, 0], 8),
    v6([0, 0, 0, 0, 0, 0, 0, 0], 127),
];

/// Private, shared, loopback, link-local, benchmarking, multicast and reserved addresses. 6to4 addresses of
/// public IPv4 addresses are not here; those of private ones are special all the same
/// ([`is_private_or_special`]).
pub const PRIVATE: &[IpNet] = &[
    v4([0, 0, 0, 0], 8),
    v4([10, 0, 0, 0], 8),
    v4([100, 64, 0, 0], 10),
    v4([127, 0, 0, 0], 8),
    v4([169, 254, 0, 0], 16),
    v4([172, 16, 0, 0], 12),
    v4([192, 0, 0, 0], 24),
    v4([192, 168, 0, 0], 16),
    v4([198, 18, 0, 0], 15),
    v4([224, 0, 0, 0], 3),
    // Unspecified, loopback, IPv4-compatible, IPv4-mapped.
    v6([0, 0, 0, 0, 0, 0, 0, 0], 80),
    // NAT64 of a local prefix (RFC 8215); discard-only; Teredo; benchmarking; ORCHID (RFC 4843, RFC 7343).
    v6([0x64, 0xff9b, 1, 0, 0, 0, 0, 0], 48),
    v6([0x100, 0, 0, 0, 0, 0, 0, 0], 64),
    v6([0x2001, 0, 0, 0, 0, 0, 0, 0], 32),
    v6([0x2001, 2, 0, 0, 0, 0, 0, 0], 48),
    v6([0x2001, 0x10, 0, 0, 0, 0, 0, 0], 28),
    v6([0x2001, 0x20, 0, 0, 0, 0, 0, 0], 28),
    // Segment routing, unique local, link-local with site-local of old, multicast.
    v6([0x5f00, 0, 0, 0, 0, 0, 0, 0], 16),
    v6([0xfc00, 0, 0, 0, 0, 0, 0, 0], 7),
    v6([0xfe80, 0, 0, 0, 0, 0, 0, 0], 9),
    v6([0xff00, 0, 0, 0, 0, 0, 0, 0], 8),
];

fn low_ipv4(address: Ipv6Addr) -> Ipv4Addr {
    let [.., a, b, c, d] = address.octets();
    Ipv4Addr::new(a, b, c, d)
}

const fn v4([a, b, c, d]: [u8; 4], length: u8) -> IpNet {
    IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(a, b, c, d), length))
}

const fn v6([a, b, c, d, e, f, g, h]: [u16; 8], length: u8) -> IpNet {
    IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::new(a, b, c, d, e, f, g, h), length))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn ip6(text: &str) -> Ipv6Addr {
        text.parse().unwrap()
    }

    #[test]
    fn every_spelling_of_an_ipv4_address_is_refused_or_judged_as_it() {
        for text in
            "::ffff:10.1.2.3 ::10.1.2.3 ::ffff:0:10.1.2.3 64:ff9b::10.1.2.3 2002:a01:203:: 2002:a01:203:1::7"
                .split(' ')
        {
            let address = ip6(text);
            assert_eq!(carried_ipv4(address), Some(Ipv4Addr::new(10, 1, 2, 3)), "{text}");
            let as_ipv4 = judged(address.into()) == ip("10.1.2.3");
            assert!(as_ipv4 || is_refused(address.into()), "{text}");
        }
        for text in "64:ff9b:1::a01:203 64:ff9b:1:a01:2:300:: 2001:0:a01:203::1 fec0::a01:203".split(' ') {
            assert!(is_refused(ip(text)), "{text}");
        }
        assert!(!is_refused(ip("64:ff9b::a01:203")), "NAT64 is judged instead");
    }

    #[test]
    fn what_leads_nowhere_is_refused_and_the_rest_is_judged_as_it_is() {
        let nowhere = ":: ::1 fe80::1 febf::1 ff02::1 ff0e::1 \
            0.0.0.0 0.255.255.255 127.0.0.1 127.255.255.255 224.0.0.1 239.1.1.1 240.0.0.1 255.255.255.255";
        for text in nowhere.split(' ').filter(|text| !text.is_empty()) {
            assert!(is_refused(ip(text)), "{text}");
        }
        for text in
            "1.0.0.0 10.0.0.1 126.255.255.255 128.0.0.0 169.254.169.254 198.18.0.1 223.255.255.255".split(' ')
        {
            assert!(!is_refused(ip(text)), "{text}");
        }
        for text in "2001:db8::1 2600::1 fd00::1 fd00:ec2::254 64:ff9c::1 2003::1 1::1".split(' ') {
            assert!(!is_refused(ip(text)), "{text}");
            assert_eq!(judged(ip(text)), ip(text));
            assert_eq!(carried_ipv4(ip6(text)), None);
        }
        assert_eq!(judged(ip("10.0.0.1")), ip("10.0.0.1"));
    }

    #[test]
    fn special_addresses_are_told_from_public_ones_at_the_edges() {
        let special = "0.0.0.0 0.255.255.255 10.0.0.0 10.255.255.255 100.64.0.0 100.127.255.255 127.0.0.1 169.254.169.254 \
            172.16.0.0 172.31.255.255 192.0.0.8 192.168.0.1 198.18.0.0 198.19.255.255 224.0.0.1 240.0.0.1 255.255.255.255 \
            :: ::1 ::10.0.0.1 ::ffff:10.8.8.8 ::ffff:0:10.8.8.8 64:ff9b::a00:1 64:ff9b:1::808:808 2002:a00:1:: 2002:c0a8:101::1 100::1 2001::1 \
            2001:2::1 2001:10::1 2001:20::1 fc00::1 fdff::1 fe80::1 febf::1 fec0::1 ff02::1 5f00::1";
        for text in special.split_whitespace() {
            assert!(is_private_or_special(ip(text)), "{text}");
        }
        let public = "1.0.0.0 9.255.255.255 11.0.0.0 100.63.255.255 100.128.0.0 126.255.255.255 128.0.0.0 169.253.255.255 \
            172.15.255.255 172.32.0.0 192.0.1.0 192.0.2.1 192.167.255.255 192.169.0.0 198.17.255.255 198.20.0.0 198.51.100.1 \
            203.0.113.1 223.255.255.255 ::ffff:8.8.8.8 64:ff9b::808:808 2002:808:808::1 2001:db8::1 2600::1 2a00:1450::1 fbff::1";
        for text in public.split_whitespace() {
            assert!(!is_private_or_special(ip(text)), "{text}");
        }
    }
}
