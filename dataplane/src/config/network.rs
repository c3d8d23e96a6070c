//! The network's part of the configuration: addresses, leases, resolvers, zones, forwards.

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use vnet_proto::model::special::{is_refused, judged};
use vnet_proto::model::{Name, NameError, ZONE_PATTERNS_MAX, ZONE_RECORDS_MAX, ZONES_MAX};

use crate::args::Args;
use crate::config::{
    DNS_PORT, GATEWAY_MAC_DEFAULT, IPV6_PREFIX_DEFAULT, IPV6_PREFIX_LENGTH, MTU_BYTES_DEFAULT, MTU_BYTES_MAX,
    MTU_BYTES_MIN, NetworkConfig, Problem, SEARCH_DOMAINS_MAX, SUBNET_DEFAULT, SUBNET_PREFIX_MAX,
    SUBNET_PREFIX_MIN, SearchDomains, ZoneSettings, canonical, nat, parse_mac,
};
use crate::engine::ip::IPV6_MTU_BYTES_MIN;
use crate::forward::{FORWARDS_MAX, ForwardSpec};
use crate::mac::Mac;
use crate::message::Forward;
use crate::zone::{Owner, OwnerProblem, ZONES_DEFAULT, Zone, ZoneProblem, ZoneRecord, default_zones};

/// Checks everything about the network. What is wrong is replaced by a default, so that the rest can be
/// checked too.
pub(super) fn check(
    args: &Args,
    name: &str,
    brought: Option<&[ZoneSettings]>,
    problems: &mut Vec<Problem>,
) -> NetworkConfig {
    let subnet = subnet(args, problems);
    let gateway =
        address("--gateway", args.gateway.as_deref(), "", problems).unwrap_or_else(|| nth_usable(subnet, 0));
    check_usable("--gateway", gateway, subnet, problems);
    let host_alias = match args.host_alias.as_deref() {
        Some("none") => None,
        text => address("--host-alias", text, " (expected one, or none)", problems)
            .or_else(|| Some(last_usable(subnet, gateway))),
    };
    if let Some(alias) = host_alias {
        check_usable("--host-alias", alias, subnet, problems);
        if alias == gateway {
            problems.push(Problem::AddressTaken {
                flag: "--host-alias",
                found: alias,
                owner: "the gateway".to_owned(),
            });
        }
    }
    let gateway_mac = args.gateway_mac.as_ref().map_or(GATEWAY_MAC_DEFAULT, |text| {
        parse_mac(text).unwrap_or_else(|| {
            problems.push(Problem::Mac {
                flag: "--gateway-mac",
                found: text.clone(),
            });
            GATEWAY_MAC_DEFAULT
        })
    });
    let mtu_bytes = args.mtu.as_ref().map_or(MTU_BYTES_DEFAULT, |text| {
        text.parse()
            .ok()
            .filter(|mtu| (MTU_BYTES_MIN..=MTU_BYTES_MAX).contains(mtu))
            .unwrap_or_else(|| {
                problems.push(Problem::Mtu(text.clone()));
                MTU_BYTES_DEFAULT
            })
    });
    let ipv6 = ipv6_prefix(args, mtu_bytes, problems);
    let nat = nat::read(args, subnet, ipv6, gateway, host_alias, problems);
    let virtual_ips = nat::virtual_ips(args, subnet, problems);
    let taken = |host: &Ipv4Addr| nat.contains_key(host) || virtual_ips.contains(host);
    let first_guest = subnet
        .hosts()
        .find(|host| *host != gateway && !taken(host))
        .unwrap_or(gateway);
    let mut network = NetworkConfig {
        name: name.to_owned(),
        subnet,
        ipv6,
        gateway,
        gateway_mac,
        host_alias,
        nat,
        virtual_ips,
        first_guest,
        mtu_bytes,
        resolvers: resolvers(args, gateway, problems),
        search: search(args, problems),
        zones: match brought {
            Some(zones) => brought_zones(zones, problems),
            None => zones(args, gateway, host_alias, problems),
        },
        static_leases: Vec::new(),
    };
    if let Some(first) = address("--first-guest", args.first_guest.as_deref(), "", problems) {
        check_guest_address("--first-guest", first, &network, problems);
        network.first_guest = first;
    }
    network.static_leases = leases(args, &network, problems);
    network
}

fn subnet(args: &Args, problems: &mut Vec<Problem>) -> Ipv4Net {
    let Some(text) = &args.subnet else {
        return SUBNET_DEFAULT;
    };
    let problem = match text.parse::<Ipv4Net>() {
        Err(_) => Problem::Subnet(text.clone()),
        Ok(net) if !(SUBNET_PREFIX_MIN..=SUBNET_PREFIX_MAX).contains(&net.prefix_len()) => {
            Problem::SubnetSize(net)
        }
        Ok(net) if net.trunc() != net => Problem::SubnetBits {
            found: text.clone(),
            meant: net.trunc(),
        },
        Ok(net) if is_unusable(net) => Problem::SubnetKind(net),
        Ok(net) => return net,
    };
    problems.push(problem);
    SUBNET_DEFAULT
}

fn ipv6_prefix(args: &Args, mtu_bytes: u16, problems: &mut Vec<Problem>) -> Option<Ipv6Net> {
    let narrow = usize::from(mtu_bytes) < IPV6_MTU_BYTES_MIN;
    let problem = match args.ipv6_prefix.as_deref() {
        None => return (!narrow).then_some(IPV6_PREFIX_DEFAULT),
        Some("off") => return None,
        Some(_) if narrow => Problem::Ipv6Mtu(mtu_bytes),
        Some(text) => match text.parse::<Ipv6Net>() {
            Ok(net) if net.prefix_len() != IPV6_PREFIX_LENGTH => Problem::Ipv6Prefix(text.to_owned()),
            Ok(net) if net.trunc() != net => Problem::Ipv6PrefixBits {
                found: text.to_owned(),
                meant: net.trunc(),
            },
            Ok(net) if is_refused(net.network().into()) || judged(net.network().into()).is_ipv4() => {
                Problem::Ipv6PrefixKind(net)
            }
            Ok(net) => return Some(net),
            Err(_) => Problem::Ipv6Prefix(text.to_owned()),
        },
    };
    problems.push(problem);
    None
}

fn is_unusable(net: Ipv4Net) -> bool {
    let first = net.network();
    let link_local = Ipv4Net::new_assert(Ipv4Addr::new(169, 254, 0, 0), 16);
    first.octets()[0] == 0
        || first.is_loopback()
        || first.octets()[0] >= 224
        || link_local.contains(&first)
        || net.contains(&link_local.network())
}

fn nth_usable(subnet: Ipv4Net, n: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(subnet.network()) + 1 + n)
}

/// The last address of a subnet but its broadcast address; the one before where the gateway has it.
fn last_usable(subnet: Ipv4Net, gateway: Ipv4Addr) -> Ipv4Addr {
    let last = u32::from(subnet.broadcast()) - 1;
    Ipv4Addr::from(if last == u32::from(gateway) {
        last - 1
    } else {
        last
    })
}

pub(super) fn address(
    flag: &'static str,
    text: Option<&str>,
    or: &'static str,
    problems: &mut Vec<Problem>,
) -> Option<Ipv4Addr> {
    let text = text?;
    let parsed = text.parse().ok();
    if parsed.is_none() {
        problems.push(Problem::Address {
            flag,
            found: text.to_owned(),
            or,
        });
    }
    parsed
}

pub(super) fn check_usable(
    flag: &'static str,
    found: Ipv4Addr,
    subnet: Ipv4Net,
    problems: &mut Vec<Problem>,
) {
    if !subnet.contains(&found) || found == subnet.network() || found == subnet.broadcast() {
        problems.push(Problem::NotInSubnet { flag, found, subnet });
    }
}

/// Checks an address that one guest is to have.
pub(super) fn check_guest_address(
    flag: &'static str,
    found: Ipv4Addr,
    network: &NetworkConfig,
    problems: &mut Vec<Problem>,
) {
    check_usable(flag, found, network.subnet, problems);
    let owner = if found == network.gateway {
        "the gateway"
    } else if Some(found) == network.host_alias {
        "the host alias"
    } else if network.nat.contains_key(&found) {
        "a --nat"
    } else if network.virtual_ips.contains(&found) {
        "a --virtual-ip"
    } else {
        return;
    };
    problems.push(Problem::AddressTaken {
        flag,
        found,
        owner: owner.to_owned(),
    });
}

fn leases(args: &Args, network: &NetworkConfig, problems: &mut Vec<Problem>) -> Vec<(Mac, Ipv4Addr)> {
    const FLAG: &str = "--static-lease";
    let mut leases: Vec<(Mac, Ipv4Addr)> = Vec::new();
    for text in &args.static_leases {
        let Some((mac_text, address_text)) = text.split_once('=') else {
            problems.push(Problem::Lease(text.clone()));
            continue;
        };
        let mac = parse_mac(mac_text);
        if mac.is_none() {
            problems.push(Problem::Mac {
                flag: FLAG,
                found: mac_text.to_owned(),
            });
        }
        let found = address(FLAG, Some(address_text), "", problems);
        let (Some(mac), Some(found)) = (mac, found) else {
            continue;
        };
        check_guest_address(FLAG, found, network, problems);
        if mac == network.gateway_mac || leases.iter().any(|(other, _)| *other == mac) {
            problems.push(Problem::LeaseTwice(mac_text.to_owned()));
        }
        if let Some((owner, _)) = leases.iter().find(|(_, other)| *other == found) {
            let owner = owner.to_string();
            problems.push(Problem::AddressTaken {
                flag: FLAG,
                found,
                owner,
            });
        }
        leases.push((mac, found));
    }
    leases
}

fn resolvers(args: &Args, gateway: Ipv4Addr, problems: &mut Vec<Problem>) -> Vec<SocketAddr> {
    let mut resolvers = Vec::new();
    for text in &args.dns {
        let bare = text
            .strip_prefix('[')
            .and_then(|t| t.strip_suffix(']'))
            .unwrap_or(text);
        let parsed = text.parse::<SocketAddr>().or_else(|_| {
            bare.parse::<IpAddr>()
                .map(|address| SocketAddr::new(address, DNS_PORT))
        });
        match parsed {
            Ok(resolver) if resolver.port() == 0 || resolver.ip().is_unspecified() => {
                problems.push(Problem::Dns(text.clone()));
            }
            Ok(resolver) if canonical(resolver.ip()) == IpAddr::V4(gateway) => {
                problems.push(Problem::DnsLoop(resolver.ip()));
            }
            Ok(resolver) => resolvers.push(resolver),
            Err(_) => problems.push(Problem::Dns(text.clone())),
        }
    }
    resolvers
}

/// In place of a search domain: those of the host.
const HOST: &str = "host";

fn search(args: &Args, problems: &mut Vec<Problem>) -> SearchDomains {
    match &args.dns_search[..] {
        [word] if word == HOST => return SearchDomains::Host,
        words if words.iter().any(|word| word == HOST) => problems.push(Problem::SearchHost),
        words if words.len() > SEARCH_DOMAINS_MAX => problems.push(Problem::SearchMany {
            found: words.len(),
            most: SEARCH_DOMAINS_MAX,
        }),
        _ => {}
    }
    let mut domains = Vec::new();
    for text in &args.dns_search {
        match text.parse() {
            Ok(domain) => domains.push(domain),
            Err(source) => problems.push(Problem::Search {
                found: text.clone(),
                source,
            }),
        }
    }
    SearchDomains::These(domains)
}

fn zones(
    args: &Args,
    gateway: Ipv4Addr,
    host_alias: Option<Ipv4Addr>,
    problems: &mut Vec<Problem>,
) -> Vec<Zone> {
    let mut zones: Vec<Zone> = Vec::new();
    for text in &args.zones {
        match zone(text) {
            Ok(zone) => zones.push(zone),
            Err(problem) => problems.push(problem),
        }
    }
    if args.no_default_zones {
        check_zones(&zones, ZONES_MAX, problems);
        return zones;
    }
    // The default ones are among those that there may be.
    check_zones(&zones, ZONES_MAX - ZONES_DEFAULT.len(), problems);
    // A zone of a flag replaces the default one of that name. The root would answer for those after it.
    let more: Vec<Zone> = default_zones(gateway, host_alias)
        .into_iter()
        .filter(|default| zones.iter().all(|zone| zone.name != default.name))
        .collect();
    let place = zones
        .iter()
        .position(|zone| zone.name.is_none())
        .unwrap_or(zones.len());
    zones.splice(place..place, more);
    zones
}

fn brought_zones(brought: &[ZoneSettings], problems: &mut Vec<Problem>) -> Vec<Zone> {
    let mut zones = Vec::new();
    for zone in brought {
        let records = zone.records.iter().map(|r| [&*r.name, &*r.regexp, &*r.address]);
        match Zone::read(&zone.name, records, &zone.default_address) {
            Ok(zone) => zones.push(zone),
            Err(problem) => problems.push(Problem::BroughtZone(problem)),
        }
    }
    check_zones(&zones, ZONES_MAX, problems);
    zones
}

fn check_zones(zones: &[Zone], most: usize, problems: &mut Vec<Problem>) {
    for (place, zone) in zones.iter().enumerate() {
        if zones[..place].iter().any(|other| other.name == zone.name) {
            problems.push(Problem::ZoneTwice(zone.text().to_owned()));
        }
    }
    let patterns = zones.iter().map(Zone::patterns).sum();
    if zones.len() > most {
        let found = zones.len();
        problems.push(Problem::ZoneMany { found, most });
    } else if patterns > ZONE_PATTERNS_MAX {
        problems.push(Problem::ZonePatterns {
            found: patterns,
            most: ZONE_PATTERNS_MAX,
        });
    }
}

/// In place of a record's address.
const UPSTREAM: &str = "upstream";

/// Reads `ZONE:NAME=ADDRESS,...`: `*` stands for every other name, `@` for the zone itself, `/PATTERN/` or
/// `NAME/PATTERN/` for the names that a pattern matches, a zone `.` for the root, and the address `upstream` for a name
/// that is looked up like one of no zone.
fn zone(text: &str) -> Result<Zone, Problem> {
    let malformed = || Problem::Zone(text.to_owned());
    let (name, mut rest) = text.split_once(':').ok_or_else(malformed)?;
    let none: [[&str; 3]; 0] = [];
    let mut zone = Zone::read(name, none.into_iter(), "").map_err(|_| Problem::ZoneName {
        found: text.to_owned(),
        part: name.to_owned(),
        source: name.parse::<Name>().err().unwrap_or(NameError::Empty),
    })?;
    loop {
        // A pattern may have commas and equals signs in it; it ends with a slash before an equals sign.
        let slash = rest
            .find('/')
            .filter(|at| rest.find(['=', ',']).is_none_or(|other| *at < other));
        let (name, pattern, after) = match slash {
            Some(at) => {
                let (pattern, after) = rest[at + 1..]
                    .split_once("/=")
                    .filter(|(pattern, _)| !pattern.is_empty())
                    .ok_or_else(malformed)?;
                (&rest[..at], pattern, after)
            }
            None => {
                let (name, after) = rest.split_once('=').ok_or_else(malformed)?;
                (name, "", after)
            }
        };
        let (address, next) = match after.split_once(',') {
            Some((address, next)) => (address, Some(next)),
            None => (after, None),
        };
        let address = match address {
            UPSTREAM if name != "*" => None,
            address => Some(address.parse().map_err(|_| Problem::ZoneAddress {
                found: text.to_owned(),
                part: address.to_owned(),
            })?),
        };
        let owner = match (name, slash) {
            ("*", None) if zone.default_address.is_some() => return Err(malformed()),
            ("*", None) => {
                zone.default_address = address;
                None
            }
            ("@", None) => Some(Owner::Apex),
            // Nothing would be the zone itself.
            ("", None) => return Err(malformed()),
            (name, _) => Some(Owner::read(name, pattern).map_err(|problem| match problem {
                OwnerProblem::Name(source) => Problem::ZoneName {
                    found: text.to_owned(),
                    part: name.to_owned(),
                    source,
                },
                OwnerProblem::Pattern(source) => Problem::ZonePattern {
                    found: text.to_owned(),
                    part: pattern.to_owned(),
                    source,
                },
            })?),
        };
        zone.records
            .extend(owner.map(|owner| ZoneRecord { owner, address }));
        match next {
            Some(next) => rest = next,
            None => break,
        }
    }
    if zone.records.len() > ZONE_RECORDS_MAX {
        return Err(Problem::BroughtZone(ZoneProblem::TooLarge(
            name.to_owned(),
            zone.records.len(),
        )));
    }
    Ok(zone)
}

/// Whether a guest may have an address.
fn is_guest(address: IpAddr, network: &NetworkConfig) -> bool {
    match address {
        IpAddr::V4(v4) => {
            let mut problems = Vec::new();
            check_guest_address("--publish", v4, network, &mut problems);
            problems.is_empty()
        }
        // The first two addresses of the prefix are any router's and the gateway's.
        IpAddr::V6(v6) => network
            .ipv6
            .is_some_and(|prefix| prefix.contains(&v6) && v6.to_bits() - prefix.network().to_bits() > 1),
    }
}

/// Reads `-p`. A forward that names no guest leads to the first.
pub(super) fn forwards(args: &Args, network: &NetworkConfig, problems: &mut Vec<Problem>) -> Vec<Forward> {
    let mut forwards: Vec<Forward> = Vec::new();
    let mut places = HashSet::new();
    for text in &args.publish {
        let spec: ForwardSpec = match text.parse() {
            Ok(spec) => spec,
            Err(error) => {
                problems.push(Problem::Publish(error));
                continue;
            }
        };
        let first_guest = IpAddr::V4(network.first_guest);
        let guest = spec.first(first_guest).target.ip();
        let subnet: IpNet = match (guest, network.ipv6) {
            (IpAddr::V6(_), Some(prefix)) => prefix.into(),
            _ => network.subnet.into(),
        };
        if !is_guest(guest, network) {
            problems.push(Problem::PublishGuest {
                found: text.clone(),
                guest,
                subnet,
            });
        }
        let before = forwards.len();
        forwards.extend(spec.forwards(first_guest));
        let mut is_twice = false;
        for forward in &forwards[before..] {
            is_twice |= forward.listen.port() != Some(0)
                && !places.insert((forward.protocol, forward.listen.clone()));
        }
        if is_twice {
            problems.push(Problem::PublishTwice(text.clone()));
        }
    }
    if forwards.len() > FORWARDS_MAX {
        problems.push(Problem::PublishMany {
            found: forwards.len(),
            most: FORWARDS_MAX,
        });
    }
    forwards
}
