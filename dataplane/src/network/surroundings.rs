//! What a guest's engine asks of its network: whose addresses are, leases, neighbours, zones, counts.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};

use vnet_proto::model::{GuardSet, Protocol, VmId};

use super::Network;
use crate::egress::way;
use crate::engine::gateway::dhcp::{self, DhcpConfig, DhcpOutcome};
use crate::engine::gateway::dns::zones::Zones;
use crate::engine::switch::Neighbour;
use crate::engine::{Surroundings, Time};
use crate::leases::LeaseCounts;
use crate::mac::Mac;
use crate::metrics::{LeaseRefusal, LinkRefusal, ResolverFault};

impl Surroundings for Network {
    fn claim(&self, vm: VmId, mac: Mac, address: IpAddr, now: Time) -> bool {
        let owned = match address {
            IpAddr::V4(v4) => {
                let (owned, counts) = {
                    let mut leases = self.lock_leases();
                    (leases.claim(vm, mac, v4, now), leases.counts())
                };
                self.count_leases(counts);
                if !owned {
                    self.tell_of_address(vm, mac, v4);
                }
                owned
            }
            IpAddr::V6(v6) => {
                let mut claims = self.lock_claims();
                let owned = claims.claim(vm, mac, v6);
                let refusals = &self.config.metrics.lease_refusals;
                refusals.of(LeaseRefusal::ClaimIpv6).raise_to(claims.refused());
                owned
            }
        };
        if owned && let Some(forwards) = self.forwards.get() {
            forwards.guest_attached(vm, address);
        }
        owned
    }

    fn release(&self, vm: VmId, address: Ipv6Addr) {
        self.lock_claims().release(vm, address);
    }

    fn has_ipv6(&self) -> bool {
        self.guards.has_ipv6()
    }

    fn has_way(&self, dialled: IpAddr) -> bool {
        match dialled {
            IpAddr::V4(_) => true,
            // Without a default route there may be one to this place.
            IpAddr::V6(v6) => self.guards.has_ipv6() || way::has_way(v6),
        }
    }

    fn dhcp(&self, vm: VmId, mac: Mac, message: &[u8], now: Time) -> DhcpOutcome {
        let followed = self.followed_search();
        let (outcome, counts) = {
            let mut leases = self.lock_leases();
            let outcome = match followed {
                Some(search_domains) => {
                    let config = DhcpConfig {
                        search_domains,
                        ..self.config.dhcp.clone()
                    };
                    dhcp::handle(&mut leases, &config, vm, mac, message, now)
                }
                None => dhcp::handle(&mut leases, &self.config.dhcp, vm, mac, message, now),
            };
            (outcome, leases.counts())
        };
        self.count_leases(counts);
        if let (Some(address), Some(forwards)) = (outcome.bound, self.forwards.get()) {
            forwards.guest_attached(vm, address.into());
        }
        outcome
    }

    fn learn_mac(&self, vm: VmId, mac: Mac) -> bool {
        // A guest may send as many frames as it likes with an address that it cannot have: they change nothing, so
        // others' look-ups go on beside them.
        let (holder, without_kept) = {
            let guests = self.read_guests();
            let without_kept = guests.by_vm.get(&vm).is_some_and(|guest| guest.without_kept);
            (guests.by_mac.get(&mac).copied(), without_kept)
        };
        if holder.is_none() && without_kept && self.lock_leases().is_kept(mac) {
            self.tell_of_mac(vm, mac, None);
            return false;
        }
        let holder = holder.unwrap_or_else(|| *self.write_guests().by_mac.entry(mac).or_insert(vm));
        if holder != vm {
            self.tell_of_mac(vm, mac, Some(holder));
        }
        holder == vm
    }

    fn neighbour(&self, address: IpAddr) -> Option<Neighbour> {
        let (vm, mac) = match address {
            IpAddr::V4(v4) => self.lock_leases().holder(v4)?,
            IpAddr::V6(v6) => self.lock_claims().holder(v6)?,
        };
        let guests = self.read_guests();
        let open = guests.by_vm.get(&vm)?.switch_open.load(Ordering::Relaxed);
        Some(Neighbour { vm, mac, open })
    }

    fn guards(&self, dialled: SocketAddr, protocol: Protocol) -> GuardSet {
        self.guards.classify(dialled.ip(), dialled.port(), protocol)
    }

    fn followed_search(&self) -> Option<Vec<vnet_proto::model::Name>> {
        let file = self.config.follow_search.as_ref()?;
        let mut file = file.lock().unwrap_or_else(PoisonError::into_inner);
        Some(file.now().search_domains.clone())
    }

    fn zones(&self) -> Arc<Zones> {
        Arc::clone(&self.zones.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let metrics = &self.config.metrics;
        let (leases, faults) = (&metrics.lease_refusals, &metrics.resolver_faults);
        let links = &metrics.link_refusals;
        vec![
            (
                "network_lease_exhausted",
                leases.of(LeaseRefusal::Exhausted).get(),
            ),
            ("network_lease_declined", leases.of(LeaseRefusal::Declined).get()),
            (
                "network_lease_claim_refused",
                leases.of(LeaseRefusal::Claim).get(),
            ),
            (
                "network_lease_claim_ipv6_refused",
                leases.of(LeaseRefusal::ClaimIpv6).get(),
            ),
            ("network_lease_limit", leases.of(LeaseRefusal::Limit).get()),
            ("network_link_limit", links.of(LinkRefusal::Limit).get()),
            ("network_link_handshake", links.of(LinkRefusal::Handshake).get()),
            ("network_link_unnamed", links.of(LinkRefusal::Unnamed).get()),
            ("network_link_unknown", links.of(LinkRefusal::Unknown).get()),
            ("network_link_further", links.of(LinkRefusal::Further).get()),
            ("network_link_system", links.of(LinkRefusal::System).get()),
            ("network_link_back", metrics.links_back.get()),
            ("network_link_given_up", metrics.links_given_up.get()),
            ("network_resolver_questions", metrics.resolver_questions.get()),
            ("network_resolver_over_tcp", metrics.resolver_over_tcp.get()),
            ("network_resolver_busy", faults.of(ResolverFault::Busy).get()),
            (
                "network_resolver_unanswered",
                faults.of(ResolverFault::Unanswered).get(),
            ),
            (
                "network_resolver_mismatched",
                faults.of(ResolverFault::Mismatched).get(),
            ),
        ]
    }
}

impl Network {
    pub(super) fn count_leases(&self, counts: LeaseCounts) {
        let LeaseCounts {
            exhausted,
            declined,
            claims_refused,
            limited,
        } = counts;
        let refusals = &self.config.metrics.lease_refusals;
        refusals.of(LeaseRefusal::Exhausted).raise_to(exhausted);
        refusals.of(LeaseRefusal::Declined).raise_to(declined);
        refusals.of(LeaseRefusal::Claim).raise_to(claims_refused);
        refusals.of(LeaseRefusal::Limit).raise_to(limited);
    }

    pub(super) fn count_resolver(&self) {
        let (metrics, counts) = (&self.config.metrics, self.resolver.counts());
        let so_far = |count: &AtomicU64| count.load(Ordering::Relaxed);
        metrics.resolver_questions.raise_to(so_far(&counts.questions));
        metrics.resolver_over_tcp.raise_to(so_far(&counts.over_tcp));
        let faults = &metrics.resolver_faults;
        faults.of(ResolverFault::Busy).raise_to(so_far(&counts.busy));
        faults
            .of(ResolverFault::Unanswered)
            .raise_to(so_far(&counts.unanswered));
        faults
            .of(ResolverFault::Mismatched)
            .raise_to(so_far(&counts.mismatched));
    }

    /// Tells, once for each guest, that it uses an address which it cannot have: what it sends from there is dropped,
    /// and looks from inside like a network that is down.
    pub(super) fn tell_of_address(&self, vm: VmId, mac: Mac, address: Ipv4Addr) {
        let holder = self.lock_leases().owner(address);
        let guests = self.read_guests();
        let Some(guest) = guests.by_vm.get(&vm) else {
            return;
        };
        if guest.told_of_address.swap(true, Ordering::Relaxed) {
            return;
        }
        let whose = match holder.and_then(|holder| guests.by_vm.get(&holder)) {
            Some(other) => format!("VM {} has it", other.name),
            None => "it is kept for another MAC address, or is none of guests".to_owned(),
        };
        tracing::warn!(
            vm = guest.name,
            %mac,
            %address,
            "a VM uses an address that it cannot have, so nothing from there passes ({whose}; have it ask by DHCP, or \
             give it another)"
        );
    }

    /// Tells, once for each guest, that it has a MAC address which it cannot have: another guest's, or, where there is
    /// none, one that a lease is kept for.
    fn tell_of_mac(&self, vm: VmId, mac: Mac, holder: Option<VmId>) {
        let guests = self.read_guests();
        let Some(guest) = guests.by_vm.get(&vm) else {
            return;
        };
        if guest.told_of_mac.swap(true, Ordering::Relaxed) {
            return;
        }
        let whose = match holder.map(|holder| guests.by_vm.get(&holder)) {
            Some(Some(other)) => format!("VM {} has it; give one of the two another", other.name),
            Some(None) => "a VM that is ending has it".to_owned(),
            None => "a lease is kept for it, for a guest of the sockets of hypervisors; give it another"
                .to_owned(),
        };
        let vm = &guest.name;
        tracing::warn!(vm, %mac, "a VM has a MAC address that it cannot have, so nothing of it passes ({whose})");
    }
}
