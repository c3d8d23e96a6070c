//! The guard of DNS: what leads to other DNS servers than the gateway, by which names would be looked up past
//! the policy.
//!
//! Owns the one table of what is known: the ports of DNS and its kin, and the names and addresses of public
//! resolvers, at which DNS over HTTPS cannot be told from the rest by its port. A policy adds names and
//! addresses of its own (`guards.resolvers`). Sources: RFC 1035 (53), RFC 7858 and RFC 9250 (853), RFC 6762
//! (5353), RFC 4795 (5355), RFC 1002 (137); for the rest the DNSCrypt project's list of public resolvers as of July 2026
//! and the operators' own pages. Of operators with a handful of rented hosts the table has the names alone: their
//! addresses are others' before long.

use std::fmt;
use std::net::IpAddr;
use std::sync::{Arc, LazyLock};

use ipnet::IpNet;
use vnet_proto::model::special::judged;
use vnet_proto::model::{FlowSubject, Name, NamePattern, PortRange, Protocol};

use crate::policy::region::{Region, Sides};
use crate::policy::{FlowTest, NameSet, PrefixSet, ProtocolSet};

/// DNS; DNS over TLS and QUIC; multicast DNS; LLMNR; NetBIOS names.
pub(crate) const PORTS: [u16; 5] = [53, 137, 853, 5353, 5355];

/// Names at which DNS over HTTPS is offered to everybody. All names below them are meant as well. The last is
/// the canary by which Firefox learns that it is not to use any.
pub(crate) const NAMES: &[&str] = &[
    "dns.google",
    "dns.google.com",
    "cloudflare-dns.com",
    "one.one.one.one",
    "cloudflare-gateway.com",
    "dns.quad9.net",
    "dns9.quad9.net",
    "dns10.quad9.net",
    "dns11.quad9.net",
    "doh.opendns.com",
    "doh.umbrella.com",
    "dns.umbrella.com",
    "doh.familyshield.opendns.com",
    "dns.adguard.com",
    "dns-family.adguard.com",
    "dns-unfiltered.adguard.com",
    "dns.nextdns.io",
    "dns.mullvad.net",
    "doh.mullvad.net",
    "dot.sb",
    "freedns.controld.com",
    "dns.controld.com",
    "doh.xfinity.com",
    "dns.comss.one",
    "doh.pub",
    "dot.pub",
    "dns.alidns.com",
    "doh.360.cn",
    "dns.twnic.tw",
    "public.dns.iij.jp",
    "doh.applied-privacy.net",
    "dns.digitale-gesellschaft.ch",
    "doh.libredns.gr",
    "dns.switch.ch",
    "odvr.nic.cz",
    "doh.ffmuc.net",
    "dns0.eu",
    "doh.tiar.app",
    "dns.njal.la",
    "wikimedia-dns.org",
    "mask.icloud.com",
    "mask-h2.icloud.com",
    "doh.dns.apple.com",
    "8888.google",
    "adguard-dns.com",
    "dns.cloudflare.com",
    "dns12.quad9.net",
    "dns13.quad9.net",
    "dns-nosec.quad9.net",
    "dns.opendns.com",
    "doh.sandbox.opendns.com",
    "cleanbrowsing.org",
    "dns.sb",
    "doh.sb",
    "joindns4.eu",
    "dns1.nextdns.io",
    "dns2.nextdns.io",
    "dot.dns.yandex.net",
    "dns.yandex.ru",
    "dns.watch",
    "canadianshield.cira.ca",
    "rethinkdns.com",
    "dnsforfamily.com",
    "dnsforge.de",
    "dnscry.pt",
    "dnscrypt.ca",
    "doh.dnscrypt.uk",
    "plan9-dns.com",
    "ahadns.net",
    "blahdns.com",
    "dnswarden.com",
    "dns4all.eu",
    "uncensoreddns.org",
    "crypto.sx",
    "adfilter.net",
    "cipherdns.co.za",
    "dnsbunker.org",
    "dnslow.me",
    "doh.appliedprivacy.net",
    "dot1.applied-privacy.net",
    "doh.tiarap.org",
    "ns0.fdn.fr",
    "ns1.fdn.fr",
    "ordns.he.net",
    "doh.lacontrevoie.fr",
    "dns.aa.net.uk",
    "dns.artikel10.org",
    "doh.bortzmeyer.fr",
    "dns.circl.lu",
    "dns.digitalsize.net",
    "dns.dnshome.de",
    "dns.as212683.net",
    "dnspub.restena.lu",
    "doh.safesurfer.io",
    "dns.safesurfer.co.nz",
    "dns.surfsharkdns.com",
    "dns.tuna.tsinghua.edu.cn",
    "dns.hinet.net",
    "dnsnl.alekberg.net",
    "doh.cox.net",
    "dot.cox.net",
    "doh-01.spectrum.com",
    "doh-02.spectrum.com",
    "dot.xfinity.com",
    "doh.bt.com",
    "dot.360.cn",
    "dns.pub",
    "doh.onedns.net",
    "dns.telekom.de",
    "doh.powerdns.org",
    "dope.snowstorm.love",
    "use-application-dns.net",
];

/// Addresses at which public resolvers answer, DNS over HTTPS included.
pub(crate) const ADDRESSES: &[&str] = &[
    // Google
    "8.8.8.8/32",
    "8.8.4.4/32",
    "2001:4860:4860::8888/128",
    "2001:4860:4860::8844/128",
    "2001:4860:4860::64/128",
    "2001:4860:4860::6464/128",
    // Cloudflare, and what its names for browsers lead to
    "1.1.1.0/30",
    "1.0.0.0/30",
    "104.16.248.249/32",
    "104.16.249.249/32",
    "104.16.132.229/32",
    "104.16.133.229/32",
    "2606:4700::6810:84e5/128",
    "2606:4700::6810:85e5/128",
    "162.159.36.0/24",
    "162.159.46.0/24",
    "162.159.61.4/32",
    "172.64.41.4/32",
    "172.64.36.0/24",
    "2606:4700:4700::/48",
    "2606:4700::6810:f8f9/128",
    "2606:4700::6810:f9f9/128",
    "2803:f800:53::4/128",
    "2a06:98c1:52::4/128",
    // Quad9
    "9.9.9.0/24",
    "149.112.112.0/24",
    "2620:fe::/48",
    // OpenDNS
    "208.67.216.0/21",
    "146.112.41.0/24",
    "2620:119:35::/48",
    "2620:119:53::/48",
    "2620:119:fc::/48",
    // AdGuard
    "94.140.14.0/24",
    "94.140.15.0/24",
    "2a10:50c0::/48",
    // NextDNS
    "45.90.28.0/22",
    "2a07:a8c0::/32",
    "2a07:a8c1::/32",
    // CleanBrowsing
    "185.228.168.0/23",
    "2a0d:2a00:1::/48",
    "2a0d:2a00:2::/48",
    // Mullvad
    "194.242.2.0/24",
    "2a07:e340::/48",
    // Control D
    "76.76.2.0/24",
    "76.76.10.0/24",
    "2606:1a40::/48",
    "2606:1a40:1::/48",
    // DNS.SB
    "185.222.222.222/32",
    "45.11.45.11/32",
    // DNSPod, AliDNS, 114DNS
    "1.12.12.12/32",
    "120.53.53.53/32",
    "119.29.29.29/32",
    "223.5.5.5/32",
    "223.6.6.6/32",
    "2400:3200::1/128",
    "2400:3200:baba::1/128",
    "114.114.114.114/32",
    "114.114.115.115/32",
    // Verisign and Neustar, Yandex, Level 3, Hurricane Electric, DNS.WATCH, dns0.eu, DNS4EU
    "64.6.64.6/32",
    "64.6.65.6/32",
    "156.154.70.0/23",
    "77.88.8.0/24",
    "2a02:6b8::feed:0/112",
    "2a02:6b8:0:1::feed:0/112",
    "4.2.2.0/29",
    "74.82.42.42/32",
    "2001:470:20::2/128",
    "84.200.69.80/32",
    "84.200.70.40/32",
    "193.110.81.0/24",
    "185.253.5.0/24",
    "86.54.11.0/24",
    "2a13:1001::/48",
    // CZ.NIC, SWITCH, Digitale Gesellschaft, Freifunk Munich, IIJ, Wikimedia, FDN
    "193.17.47.0/24",
    "185.43.135.0/24",
    "2001:148f:fffe::/47",
    "130.59.31.248/32",
    "130.59.31.251/32",
    "2001:620:0:ff::/64",
    "185.95.218.42/31",
    "2a05:fc84::42/127",
    "5.1.66.255/32",
    "185.150.99.255/32",
    "2001:678:e68:f000::/64",
    "2001:678:ed0:f000::/64",
    "103.2.57.5/32",
    "103.2.57.6/32",
    "185.71.138.138/32",
    "2001:67c:930::1/128",
    "80.67.169.12/32",
    "80.67.169.40/32",
    "2001:910:800::12/128",
    "2001:910:800::40/128",
    // CIRA, Andrews & Arnold, UncensoredDNS, DNS4all, RESTENA, LibreDNS, Njalla
    "149.112.121.0/24",
    "149.112.122.0/24",
    "2620:10a:80bb::/48",
    "2620:10a:80bc::/48",
    "217.169.20.22/31",
    "2001:8b0::2022/127",
    "91.239.100.100/32",
    "89.233.43.71/32",
    "2001:67c:28a4::/128",
    "2a01:3a0:53:53::/128",
    "194.0.5.3/32",
    "194.0.5.64/32",
    "2001:678:8::3/128",
    "2001:678:8::64/128",
    "158.64.1.29/32",
    "116.202.176.26/32",
    "95.215.19.53/32",
];

/// How a flow would reach another DNS server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// Port 53.
    Plain,
    /// TCP port 853.
    Tls,
    /// UDP port 853.
    Quic,
    /// Multicast DNS, on port 5353.
    Multicast,
    /// Link-local multicast name resolution, on port 5355.
    Llmnr,
    /// NetBIOS names, on port 137.
    NetBios,
    /// Whatever port of a known resolver's address: DNS over HTTPS, or of a form of its own.
    Known,
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Plain => "DNS to another server",
            Self::Tls => "DNS over TLS",
            Self::Quic => "DNS over QUIC",
            Self::Multicast => "multicast DNS",
            Self::Llmnr => "LLMNR",
            Self::NetBios => "NetBIOS name service",
            Self::Known => "a public resolver's address, where DNS over HTTPS is offered",
        })
    }
}

impl Way {
    fn of(protocol: Protocol, port: u16) -> Self {
        match (port, protocol) {
            (853, Protocol::Udp) => Self::Quic,
            (853, _) => Self::Tls,
            (5353, _) => Self::Multicast,
            (5355, _) => Self::Llmnr,
            (137, _) => Self::NetBios,
            _ => Self::Plain,
        }
    }
}

/// What is known of DNS servers, by a policy.
#[derive(Debug, Clone)]
pub(crate) struct Resolvers {
    ports: FlowTest,
    addresses: FlowTest,
    names: NameSet,
}

impl Default for Resolvers {
    /// Those that are built in.
    fn default() -> Self {
        let test = || FlowTest {
            protocols: ProtocolSet::TCP_UDP,
            ..FlowTest::default()
        };
        let (names, prefixes) = &*BUILT_IN;
        Self {
            ports: FlowTest {
                ports: PORTS.into_iter().map(PortRange::one).collect(),
                ..test()
            },
            addresses: FlowTest {
                prefixes: prefixes.clone(),
                ..test()
            },
            names: names.clone(),
        }
    }
}

/// Parsed once, and shared by all policies.
static BUILT_IN: LazyLock<(NameSet, PrefixSet)> = LazyLock::new(|| {
    let names = NAMES.iter().filter_map(|text| text.parse::<Name>().ok());
    let names = names.flat_map(|name| [NamePattern::Exact(name.clone()), NamePattern::Subdomains(name)]);
    let prefixes = ADDRESSES.iter().filter_map(|text| text.parse::<IpNet>().ok());
    (names.collect(), prefixes.collect())
});

impl Resolvers {
    /// With names and addresses of a policy's own.
    pub(crate) fn with(names: &NameSet, prefixes: &PrefixSet) -> Self {
        let mut all = Self::default();
        for table in names.tables() {
            all.names.share(Arc::clone(table));
        }
        for table in prefixes.tables() {
            all.addresses.prefixes.share(Arc::clone(table));
        }
        all
    }

    /// The names of resolvers.
    pub(crate) fn names(&self) -> &NameSet {
        &self.names
    }

    /// The addresses of resolvers.
    pub(crate) fn addresses(&self) -> &PrefixSet {
        &self.addresses.prefixes
    }

    /// Whether a flow leads to another DNS server, and how. One that does stands for itself alone; else the
    /// region keeps clear of those that do.
    pub(crate) fn way(&self, flow: &FlowSubject, region: &mut Region) -> Option<Way> {
        let key = &flow.key;
        let way = if region.test(&self.ports, flow, Sides::Either) {
            Way::of(key.protocol, key.peer.port())
        } else if region.test(&self.addresses, flow, Sides::Either) {
            Way::Known
        } else {
            return None;
        };
        region.limit(IpNet::from(key.peer.ip()));
        Some(way)
    }

    /// Whether a rule or grant that matches such a flow names what it leads to: the port by itself, the one
    /// address, or a resolver's very name. A range of ports, a prefix or a pattern do not.
    pub(crate) fn is_named(
        &self,
        way: Way,
        test: &FlowTest,
        flow: &FlowSubject,
        region: &mut Region,
    ) -> bool {
        let peer = flow.key.peer;
        let names = |address| {
            test.prefixes
                .holding(address)
                .any(|prefix| is_one(prefix, address))
        };
        if names(peer.ip()) || names(judged(flow.dialled)) {
            return true;
        }
        if way != Way::Known {
            let range = test.ports.range_of(peer.port());
            return range.is_some_and(|range| range.first() == range.last());
        }
        let Some(names) = &test.names else { return false };
        region.consult_names(peer.ip());
        let known = |name: &&Name| self.names.contains(name) && names.has_exact(name);
        flow.names.iter().any(|name| known(&name))
    }
}

fn is_one(prefix: IpNet, address: IpAddr) -> bool {
    prefix == IpNet::from(address)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_and_address_of_the_table_is_well_formed_and_there_once() {
        for text in NAMES {
            assert_eq!(text.parse::<Name>().unwrap().as_str(), *text);
        }
        for text in ADDRESSES {
            let prefix: IpNet = text.parse().unwrap();
            assert_eq!(prefix, prefix.trunc(), "{text} has bits beyond its length");
        }
        let (names, prefixes) = &*BUILT_IN;
        assert_eq!((names.len(), prefixes.len()), (2 * NAMES.len(), ADDRESSES.len()));
    }
}
