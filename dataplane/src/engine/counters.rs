//! What is counted of one guest beside the frames that were not delivered: what its gateway did, and what
//! met a limit. They reach the controlplane with the guest's status (`vnetctl vm show`), by name; those at
//! zero are left out.

use std::collections::BTreeMap;

use crate::engine::Engine;
use crate::engine::gateway::dhcp::DhcpIgnored;
use crate::engine::gateway::dns::DnsCounts;
use crate::engine::inspect::InspectRefusal;

/// DHCP messages that were not answered, by why.
#[derive(Debug, Default)]
pub(super) struct DhcpCounts([u64; DhcpIgnored::ALL.len()]);

impl DhcpCounts {
    pub(super) fn add(&mut self, why: DhcpIgnored) {
        self.0[why as usize] += 1;
    }
}

impl Engine {
    /// Everything that is counted, by name.
    pub(super) fn counters(&self) -> BTreeMap<String, u64> {
        let own = [
            ("decisions_unnamed", self.tally.unnamed),
            ("verdicts_evicted", self.cache.evictions),
            ("budgets_refused", self.budgets.refused),
            ("bindings_evicted", self.bindings.evicted()),
            ("dns_alias_refused", self.aliases.refused),
            ("dns_alias_limit", self.aliases.beyond_limit),
            ("connections_unopened", self.unopened),
            ("descriptors_refused", self.descriptors_refused),
            ("flows_made_way", self.made_way),
            ("dials_failed", self.dials_failed),
            ("forward_client_refused", self.ingress_refused),
            ("ring_growth_refused", self.rings.refused()),
            ("guest_api_refused", self.guest_api.refused),
            ("capture_dropped", self.capture_dropped),
        ];
        let dhcp = DhcpIgnored::ALL.map(|why| (why.word(), self.dhcp.0[why as usize]));
        let names = InspectRefusal::WORDS.into_iter().zip(self.name_refusals);
        own.into_iter()
            .chain(names)
            .chain(dhcp)
            .chain(dns(self.dns.counts()))
            .chain(self.synthetics.counters())
            .chain(self.surroundings.counters())
            .filter(|(_, count)| *count != 0)
            .map(|(name, count)| (name.to_owned(), count))
            .collect()
    }
}

/// Each by the name of its field, so that none can be forgotten.
fn dns(counts: DnsCounts) -> [(&'static str, u64); 13] {
    let DnsCounts {
        ignored,
        malformed,
        local,
        repeated,
        held_full,
        upstream_full,
        connections_full,
        hold_ended,
        upstream_failed,
        relayed,
        limited,
        redirected,
        synthetic,
    } = counts;
    [
        ("dns_ignored", ignored),
        ("dns_malformed", malformed),
        ("dns_local", local),
        ("dns_repeated", repeated),
        ("dns_held_limit", held_full),
        ("dns_upstream_limit", upstream_full),
        ("dns_connection_limit", connections_full),
        ("dns_hold_ended", hold_ended),
        ("dns_upstream_failed", upstream_failed),
        ("dns_relayed", relayed),
        ("dns_limited", limited),
        ("dns_redirected", redirected),
        ("dns_synthetic", synthetic),
    ]
}
