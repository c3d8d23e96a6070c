//! Addresses that the gateway stands for beside its own: what is dialled elsewhere, and virtual addresses.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};

use ipnet::{Ipv4Net, Ipv6Net};
use vnet_proto::model::special::is_refused;

use crate::args::Args;
use crate::config::network::{address, check_usable};
use crate::config::{Problem, canonical};
use crate::engine::nat::NAT_MAX;
use crate::engine::synthetic::table::RANGE_V4;

/// Reads `--nat`. The host alias leads to 127.0.0.1, unless it is said otherwise.
pub(super) fn read(
    args: &Args,
    subnet: Ipv4Net,
    ipv6: Option<Ipv6Net>,
    gateway: Ipv4Addr,
    host_alias: Option<Ipv4Addr>,
    problems: &mut Vec<Problem>,
) -> BTreeMap<Ipv4Addr, IpAddr> {
    const FLAG: &str = "--nat";
    check_number(FLAG, args.nat.len(), problems);
    let mut nat = BTreeMap::new();
    for text in args.nat.iter().take(NAT_MAX) {
        let Some((from_text, to_text)) = text.split_once('=') else {
            problems.push(Problem::Nat(text.clone()));
            continue;
        };
        let from = from_text
            .parse::<Ipv4Addr>()
            .ok()
            .filter(|from| !is_refused((*from).into()));
        let to = to_text.parse::<IpAddr>().ok().map(canonical);
        let to = to.filter(|to| to.is_loopback() || !is_refused(*to));
        let (Some(from), Some(to)) = (from, to) else {
            let found = text.clone();
            problems.push(match from {
                None => Problem::NatFrom {
                    found,
                    address: from_text.to_owned(),
                },
                Some(_) => Problem::NatTo {
                    found,
                    address: to_text.to_owned(),
                },
            });
            continue;
        };
        if subnet.contains(&from) {
            check_usable(FLAG, from, subnet, problems);
        }
        if from == gateway {
            problems.push(Problem::AddressTaken {
                flag: FLAG,
                found: from,
                owner: "the gateway".to_owned(),
            });
        }
        if RANGE_V4.contains(&from) {
            problems.push(Problem::NatFromSynthetic {
                found: text.clone(),
                address: from,
                range: RANGE_V4,
            });
        }
        let for_guests = match to {
            IpAddr::V4(v4) => subnet.contains(&v4),
            IpAddr::V6(v6) => ipv6.is_some_and(|prefix| prefix.contains(&v6)),
        };
        if for_guests {
            problems.push(Problem::NatToGuest {
                found: text.clone(),
                address: to,
            });
        }
        if nat.insert(from, to).is_some() {
            problems.push(Problem::NatTwice(from));
        }
    }
    if let Some(alias) = host_alias {
        nat.entry(alias).or_insert(Ipv4Addr::LOCALHOST.into());
    }
    nat
}

/// Reads `--virtual-ip`. The gateway's own address may be among them, and is answered for already.
pub(super) fn virtual_ips(args: &Args, subnet: Ipv4Net, problems: &mut Vec<Problem>) -> Vec<Ipv4Addr> {
    const FLAG: &str = "--virtual-ip";
    check_number(FLAG, args.virtual_ips.len(), problems);
    let mut addresses = Vec::new();
    for text in args.virtual_ips.iter().take(NAT_MAX) {
        let Some(found) = address(FLAG, Some(text), "", problems) else {
            continue;
        };
        if subnet.contains(&found) {
            check_usable(FLAG, found, subnet, problems);
        } else if is_refused(found.into()) {
            problems.push(Problem::VirtualIp(found));
        }
        if !addresses.contains(&found) {
            addresses.push(found);
        }
    }
    addresses
}

fn check_number(flag: &'static str, found: usize, problems: &mut Vec<Problem>) {
    if found > NAT_MAX {
        problems.push(Problem::AddressesMany {
            flag,
            found,
            most: NAT_MAX,
        });
    }
}
