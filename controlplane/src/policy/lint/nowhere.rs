//! Prefixes of rules that nothing is ever let to.

use std::net::Ipv6Addr;

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

/// Whether a dataplane lets nothing to any address of a prefix. Of IPv6 it refuses whole prefixes, so that one
/// address on each side of every way to split this one will do. Loopback is where the host's alias leads.
fn leads_nowhere(prefix: IpNet) -> bool {
    match prefix {
        IpNet::V4(prefix) => match prefix.network().octets() {
            [0, ..] => prefix.prefix_len() >= 8,
            [first, ..] => prefix.prefix_len() >= 3 && first >= 224,
        },
        IpNet::V6(prefix) => {
            let ends = [prefix.network().to_bits(), prefix.broadcast().to_bits()];
            let bits = 0..128 - u32::from(prefix.prefix_len());
            let beside = bits.flat_map(|bit| ends.map(|end| end ^ (1 << bit)));
            let mut all = ends.into_iter().chain(beside).map(Ipv6Addr::from_bits);
            !prefix.contains(&Ipv6Addr::LOCALHOST) && all.all(is_refused)
        }
    }
}
