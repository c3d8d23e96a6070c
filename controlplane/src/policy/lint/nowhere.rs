//! Prefixes of rules that nothing is ever let to.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use vnet_proto::model::special::is_refused;

use crate::policy::Rule;
use crate::policy::lint::PREFIXES_COMPARED_MAX;

/// Prefixes that are hardly what was meant: one unspecified address, and those that lead nowhere anyway.
pub(super) fn of_prefixes(rule: &Rule) -> Vec<String> {
    let label = &rule.label;
    let written = || rule.test.prefixes.iter().take(PREFIXES_COMPARED_MAX);
    let mut texts = Vec::new();
    if let Some(one) = written().find(|prefix| is_one_unspecified(*prefix)) {
        let address = one.addr();
        texts.push(format!(
            "{label}: {address} is one address; for every address write {address}/0"
        ));
    }
    let nowhere = |prefix: &IpNet| !is_one_unspecified(*prefix) && leads_nowhere(*prefix);
    if let Some(prefix) = written().find(nowhere) {
        texts.push(format!(
            "{label}: {prefix} can never match: nothing is let to such addresses, whatever a policy says"
        ));
    }
    texts
}

fn is_one_unspecified(prefix: IpNet) -> bool {
    prefix.prefix_len() == prefix.max_prefix_len() && prefix.addr().is_unspecified()
}

/// Whether a dataplane lets nothing to any address of a prefix. It refuses whole prefixes, so that one address on each
/// side of every way to split this one will do. Loopback is where the host's alias leads.
fn leads_nowhere(prefix: IpNet) -> bool {
    let ends = [prefix.network(), prefix.broadcast()];
    let bits = 0..u32::from(prefix.max_prefix_len() - prefix.prefix_len());
    let beside = bits.flat_map(|bit| ends.map(|end| flipped(end, bit)));
    let mut all = ends.into_iter().chain(beside);
    all.all(|address| is_refused(address) && !address.is_loopback())
}

/// With one bit the other way, counted from the lowest.
fn flipped(address: IpAddr, bit: u32) -> IpAddr {
    match address {
        IpAddr::V4(v4) => Ipv4Addr::from_bits(v4.to_bits() ^ 1 << bit).into(),
        IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits() ^ 1 << bit).into(),
    }
}
