//! The verdict cache: what may pass without asking.
//!
//! A verdict holds inside a match: a protocol, a destination prefix and a range of ports. Entries are
//! kept in one hash table for each shape of match (protocol, prefix length, one port or a range), and
//! the number of shapes is bounded, so that a lookup costs the same with one entry or a hundred
//! thousand. A verdict that would need one shape too many is narrowed to the flow that missed. The
//! hash is keyed at random: a guest cannot aim at its buckets.
//!
//! What ends an entry: its own expiry or budget, the lease (for allows), a later epoch, or a change of the names
//! bound to its address, if they were looked at.

mod names;
mod report;

use std::collections::VecDeque;
use std::net::IpAddr;
use std::sync::Arc;

use ahash::{HashMap, HashMapExt as _};
use vnet_proto::model::{
    Epoch, FlowKey, FlowMatch, GuardSet, Match, Name, NameDemand, PortRange, Protocol, Reason, Verdict,
    VerdictAction, VmId,
};

use crate::engine::Time;
use crate::engine::budget::{self, Meter};
use crate::engine::cache::names::NameTable;
use crate::engine::inspect::{Level, NameList};

/// Flow verdicts kept.
pub const FLOW_ENTRIES_MAX: usize = 131_072;
/// Shapes of match a protocol may have in use beyond the exact one.
const SHAPES_MAX: usize = 7;
/// Port ranges kept for one prefix.
const RANGES_MAX: usize = 64;

/// What was decided, as every flow that rests on it needs it.
#[derive(Debug, Clone)]
pub struct Decision {
    /// What is done.
    pub action: VerdictAction,
    /// When it was made.
    pub epoch: Epoch,
    /// When it ends by itself.
    pub expires_at: Option<Time>,
    /// The grant that it rests on; empty for none.
    pub grant: String,
    /// What counts this guest's use of that grant, if it has a budget.
    pub meter: Option<Arc<Meter>>,
    /// Why.
    pub reason: Reason,
    /// Observe mode let through what would have been denied.
    pub would_deny: bool,
    /// It is for one flow or lookup only.
    pub once: bool,
    /// Until when a connection of its grant's budget is set aside for it; one that opens later might be one too
    /// many. `None`: for as long as it holds.
    pub opens_until: Option<Time>,
    /// A lookup that it allows is answered with a synthetic address, and nothing of it goes upstream.
    pub synthetic_only: bool,
    /// How what missed stood. No match reaches across it: a flow that stands otherwise is a miss,
    /// whatever the match says.
    pub standing: Standing,
    /// What a flow must say of its name; `None`: nothing. It is here and not in the miss's answer alone, so
    /// that a hit demands what the miss did.
    pub naming: Option<Naming>,
}

impl Decision {
    /// The same for a flow that may speak none but these names. `None`: a name is demanded, and none is left.
    pub fn speaking_only(self: &Arc<Self>, names: &[Name]) -> Option<Arc<Self>> {
        let Some(naming) = &self.naming else {
            return Some(Arc::clone(self));
        };
        let list = &naming.names;
        if list.names.iter().all(|name| names.contains(name)) {
            return Some(Arc::clone(self));
        }
        let left = list.names.iter().filter(|name| names.contains(name));
        let list = NameList {
            names: left.cloned().collect(),
            ..NameList::clone(list)
        };
        let naming = Naming {
            demand: naming.demand,
            names: Arc::new(list),
        };
        (!naming.names.names.is_empty()).then(|| {
            Arc::new(Self {
                naming: Some(naming),
                ..Self::clone(self)
            })
        })
    }
}

/// What a flow must say of the name that its verdict rests on.
#[derive(Debug, Clone)]
pub struct Naming {
    /// How much, as the verdict says.
    pub demand: NameDemand,
    /// Which names, at which ports: those that the verdict is for.
    pub names: Arc<NameList>,
}

/// What holds of a destination at one moment and does not show in its address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Standing {
    /// The guards that it is under.
    pub guards: GuardSet,
    /// The other guest that it belongs to, under [`Guard::Guest`](vnet_proto::model::Guard::Guest). Whoever
    /// has the address next is judged anew.
    pub neighbour: Option<VmId>,
    /// What it is dialled at, where that is another address.
    pub moved: Option<IpAddr>,
}

impl Decision {
    /// What a verdict that arrives now decides, for what stands so.
    pub fn new(now: Time, verdict: &Verdict, standing: Standing, meter: Option<Arc<Meter>>) -> Self {
        Self {
            standing,
            meter,
            action: verdict.action,
            epoch: verdict.epoch,
            expires_at: verdict.expires_in.map(|d| now.saturating_add(d)),
            grant: verdict.grant.clone(),
            reason: verdict.reason.clone(),
            would_deny: verdict.would_deny,
            once: verdict.once || budget::is_for_once(verdict.budget),
            opens_until: budget::is_for_once(verdict.budget).then(|| now + budget::SET_ASIDE),
            synthetic_only: verdict.synthetic_only,
            naming: Naming::of(verdict),
        }
    }

    /// What is demanded of one flow that rests on it.
    pub fn level(&self, key: &FlowKey) -> Option<Level> {
        let naming = self.naming.as_ref()?;
        match naming.demand.of(key.protocol, key.peer.port()) {
            NameDemand::Require => Some(Level::Require),
            NameDemand::IfPresent | NameDemand::ByPort => Some(Level::MatchIfPresent),
            NameDemand::Off => None,
        }
    }
}

impl Naming {
    fn of(verdict: &Verdict) -> Option<Self> {
        let Match::Flow(found) = &verdict.found else {
            return None;
        };
        let demanded = verdict.action == VerdictAction::Allow && verdict.name_demand != NameDemand::Off;
        demanded.then(|| Self {
            demand: verdict.name_demand,
            names: Arc::new(NameList {
                names: verdict.names.clone(),
                ports: found.ports,
            }),
        })
    }
}

/// The cache of one VM.
#[derive(Default)]
pub struct Cache {
    epoch: Option<Epoch>,
    lease_until: Time,
    /// How much longer than the lease allows that rest on no grant hold.
    pub loss_grace: Time,
    shapes: Vec<Shape>,
    /// Keys in the order they came, oldest first, for eviction. May name entries already gone.
    order: VecDeque<(usize, ShapeKey)>,
    entries: usize,
    by_address: HashMap<IpAddr, Vec<(usize, ShapeKey)>>,
    lookups: NameTable,
    aliases: NameTable,
    /// Entries thrown out at a limit.
    pub evictions: u64,
}

struct Shape {
    protocol: Protocol,
    is_v4: bool,
    prefix_length: u8,
    one_port: bool,
    table: HashMap<ShapeKey, Vec<Region>>,
}

/// A masked destination, and the port for shapes of one port.
type ShapeKey = (u128, u16);

struct Region {
    ports: PortRange,
    names_consulted: bool,
    decision: Arc<Decision>,
}

impl Cache {
    /// The epoch in force, once a controlplane has said it.
    pub fn epoch(&self) -> Option<Epoch> {
        self.epoch
    }

    /// Everything older than `epoch` is void from now.
    pub fn revoke(&mut self, epoch: Epoch) {
        self.epoch = Some(epoch);
        self.clear();
    }

    /// Allows of the epoch in force hold until `until`. Ignored for any other epoch.
    pub fn renew(&mut self, epoch: Epoch, until: Time) {
        if self.epoch == Some(epoch) {
            self.lease_until = self.lease_until.max(until);
        }
    }

    /// Forgets every verdict.
    pub fn clear(&mut self) {
        let (epoch, lease_until, evictions) = (self.epoch, self.lease_until, self.evictions);
        *self = Self {
            epoch,
            lease_until,
            loss_grace: self.loss_grace,
            evictions,
            ..Self::default()
        };
    }

    /// Flow verdicts held.
    pub fn len(&self) -> usize {
        self.entries
    }

    /// Whether no flow verdict is held.
    pub fn is_empty(&self) -> bool {
        self.entries == 0
    }

    /// The decision that covers a flow that stands so now, if one does. `None` is a miss.
    pub fn lookup(&self, now: Time, key: &FlowKey, standing: Standing) -> Option<&Arc<Decision>> {
        let key = key.judged();
        let (port, address) = (key.peer.port(), key.peer.ip());
        self.shapes
            .iter()
            .filter(|s| s.protocol == key.protocol && s.is_v4 == address.is_ipv4())
            .find_map(|shape| {
                let regions = shape.table.get(&shape.key(address, port))?;
                let at = regions.partition_point(|r| r.ports.last() < port);
                let region = regions.get(at).filter(|r| r.ports.contains(port))?;
                let decision = &region.decision;
                (decision.standing == standing && self.holds(now, decision)).then_some(decision)
            })
    }

    /// The decision that covers a lookup now, if one does.
    pub fn lookup_name(&self, now: Time, name: &Name) -> Option<&Arc<Decision>> {
        self.lookups
            .find(name)
            .filter(|decision| self.holds(now, decision))
    }

    /// The decision that covers an alias now, if one does. None of a lookup does, and the other way round.
    pub fn lookup_alias(&self, now: Time, name: &Name) -> Option<&Arc<Decision>> {
        self.aliases
            .find(name)
            .filter(|decision| self.holds(now, decision))
    }

    /// Whether a decision could be made again now: it is of the epoch in force, leased, and not over.
    pub fn stands(&self, now: Time, decision: &Decision) -> bool {
        let in_force = self.epoch.is_some_and(|epoch| decision.epoch.stands_under(epoch));
        in_force && self.holds(now, decision)
    }

    /// Whether a decision that was made holds now: it is leased, within its budget, and not over.
    pub fn holds(&self, now: Time, decision: &Decision) -> bool {
        // What a person said goes with the lease; what the policy's file says may outlive it.
        let lease_until = if decision.grant.is_empty() {
            self.lease_until.saturating_add(self.loss_grace)
        } else {
            self.lease_until
        };
        let leased = decision.action != VerdictAction::Allow || now < lease_until;
        let in_budget = decision.meter.as_ref().is_none_or(|meter| !meter.is_used_up());
        leased && in_budget && decision.expires_at.is_none_or(|at| now < at)
    }

    /// Takes a verdict that is not for once. The caller has checked its epoch. `flow` is the flow
    /// that missed; a match that is too odd to keep is narrowed to it.
    pub fn install(&mut self, verdict: &Verdict, decision: &Arc<Decision>, flow: Option<&FlowKey>) {
        match &verdict.found {
            Match::Flow(found) => self.install_flow(found, decision, flow),
            Match::Lookup(found) => self.evictions += self.lookups.install(found, decision),
            Match::Alias(found) => self.evictions += self.aliases.install(found, decision),
        }
    }

    fn install_flow(&mut self, found: &FlowMatch, decision: &Arc<Decision>, flow: Option<&FlowKey>) {
        let narrowed;
        let mut found = found;
        let shape = match self.shape_for(found) {
            Some(shape) if !self.shapes[shape].is_crowded(found) => shape,
            _ => {
                let Some(flow) = flow.filter(|flow| found.matches(flow)) else {
                    return;
                };
                narrowed = FlowMatch {
                    names_consulted: found.names_consulted,
                    ..FlowMatch::exact(flow)
                };
                found = &narrowed;
                match self.shape_for(found) {
                    Some(shape) => shape,
                    None => return,
                }
            }
        };
        let key = self.shapes[shape].key(found.prefix.addr(), found.ports.first());
        let region = Region {
            ports: found.ports,
            names_consulted: found.names_consulted,
            decision: Arc::clone(decision),
        };
        let regions = self.shapes[shape].table.entry(key).or_default();
        // A later verdict of the same epoch agrees with an earlier one where they overlap.
        let before = regions.len();
        regions.retain(|r| r.ports.last() < region.ports.first() || r.ports.first() > region.ports.last());
        let at = regions.partition_point(|r| r.ports.last() < region.ports.first());
        regions.insert(at, region);
        self.entries = self.entries + 1 + regions.len() - 1 - before;
        self.order.push_back((shape, key));
        if found.names_consulted {
            let places = self.by_address.entry(found.prefix.addr()).or_default();
            if !places.contains(&(shape, key)) {
                places.push((shape, key));
            }
        }
        while self.entries > FLOW_ENTRIES_MAX || self.order.len() > 2 * FLOW_ENTRIES_MAX {
            let Some((shape, key)) = self.order.pop_front() else {
                break;
            };
            if let Some(gone) = self.shapes[shape].table.remove(&key) {
                self.entries -= gone.len();
                self.evictions += gone.len() as u64;
                if gone.iter().any(|region| region.names_consulted) {
                    self.unindex(shape, key);
                }
            }
        }
    }

    /// An entry that looked at names is gone: its address need not lead to it any more.
    fn unindex(&mut self, shape: usize, key: ShapeKey) {
        let address = self.shapes[shape].address(key);
        if let Some(places) = self.by_address.get_mut(&address) {
            places.retain(|place| *place != (shape, key));
            if places.is_empty() {
                self.by_address.remove(&address);
            }
        }
    }

    fn shape_for(&mut self, found: &FlowMatch) -> Option<usize> {
        let wanted = (
            found.protocol,
            found.prefix.addr().is_ipv4(),
            found.prefix.prefix_len(),
            found.ports.first() == found.ports.last(),
        );
        let same = |s: &Shape| (s.protocol, s.is_v4, s.prefix_length, s.one_port) == wanted;
        if let Some(index) = self.shapes.iter().position(same) {
            return Some(index);
        }
        let exact = found.is_one_address() && wanted.3;
        let in_use = self
            .shapes
            .iter()
            .filter(|s| s.protocol == wanted.0 && s.is_v4 == wanted.1 && !s.is_exact())
            .count();
        if !exact && in_use >= SHAPES_MAX {
            return None;
        }
        self.shapes.push(Shape {
            protocol: wanted.0,
            is_v4: wanted.1,
            prefix_length: wanted.2,
            one_port: wanted.3,
            table: HashMap::new(),
        });
        Some(self.shapes.len() - 1)
    }

    /// The names bound to an address changed: verdicts that looked at them are void.
    pub fn forget_address(&mut self, address: IpAddr) {
        for (shape, key) in self.by_address.remove(&address).unwrap_or_default() {
            let Some(regions) = self.shapes[shape].table.get_mut(&key) else {
                continue;
            };
            let before = regions.len();
            regions.retain(|r| !r.names_consulted);
            self.entries -= before - regions.len();
            if regions.is_empty() {
                self.shapes[shape].table.remove(&key);
            }
        }
    }
}

impl Shape {
    fn key(&self, address: IpAddr, port: u16) -> ShapeKey {
        let port = if self.one_port { port } else { 0 };
        let bits = match address {
            IpAddr::V4(v4) => u128::from(u32::from(v4)) & mask(self.prefix_length, 32),
            IpAddr::V6(v6) => u128::from(v6) & mask(self.prefix_length, 128),
        };
        (bits, port)
    }

    /// The address of a key, for shapes of one address.
    fn address(&self, key: ShapeKey) -> IpAddr {
        if self.is_v4 {
            IpAddr::from(u32::try_from(key.0).unwrap_or(0).to_be_bytes())
        } else {
            IpAddr::from(key.0.to_be_bytes())
        }
    }

    fn is_exact(&self) -> bool {
        self.one_port && self.prefix_length == if self.is_v4 { 32 } else { 128 }
    }

    fn is_crowded(&self, found: &FlowMatch) -> bool {
        let key = self.key(found.prefix.addr(), found.ports.first());
        self.table
            .get(&key)
            .is_some_and(|regions| regions.len() >= RANGES_MAX)
    }
}

fn mask(length: u8, width: u32) -> u128 {
    let all = if width == 128 { u128::MAX } else { (1 << width) - 1 };
    let free = width - u32::from(length);
    if free >= 128 { 0 } else { all >> free << free }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;
    use std::time::Duration;

    use vnet_proto::model::{LookupMatch, MissId, NameDemand, parse_prefix};

    use super::*;

    pub(super) const EPOCH: Epoch = Epoch {
        incarnation: 1,
        counter: 1,
    };

    fn key(peer: &str) -> FlowKey {
        FlowKey {
            protocol: Protocol::Tcp,
            guest: "192.168.127.2:1".parse().unwrap(),
            peer: peer.parse().unwrap(),
        }
    }

    /// A verdict on a match, of which nothing else is said.
    pub(super) fn verdict_on(action: VerdictAction, found: Match) -> Verdict {
        Verdict {
            miss: MissId(1),
            action,
            found,
            epoch: EPOCH,
            expires_in: None,
            once: false,
            budget: None,
            grant: String::new(),
            synthetic_only: false,
            reason: Reason::default(),
            would_deny: false,
            name_demand: NameDemand::Off,
            names: Vec::new(),
        }
    }

    fn verdict(action: VerdictAction, prefix: &str, ports: &str) -> Verdict {
        let found = FlowMatch {
            protocol: Protocol::Tcp,
            prefix: parse_prefix(prefix).unwrap(),
            ports: ports.parse().unwrap(),
            names_consulted: false,
        };
        verdict_on(action, Match::Flow(found))
    }

    fn put(cache: &mut Cache, verdict: &Verdict, flow: Option<&FlowKey>) {
        cache.install(
            verdict,
            &Arc::new(Decision::new(Time::ZERO, verdict, Standing::default(), None)),
            flow,
        );
    }

    fn cache() -> Cache {
        let mut cache = Cache::default();
        cache.revoke(EPOCH);
        cache.renew(EPOCH, Duration::from_secs(60));
        cache
    }

    #[test]
    fn one_verdict_answers_everything_inside_its_match_and_nothing_else() {
        let mut cache = cache();
        put(
            &mut cache,
            &verdict(VerdictAction::Allow, "10.0.0.0/8", "80-90"),
            None,
        );
        for (peer, hit) in [
            ("10.1.2.3:80", true),
            ("10.255.0.1:90", true),
            ("10.1.2.3:91", false),
            ("11.0.0.1:80", false),
        ] {
            assert_eq!(
                cache
                    .lookup(Time::ZERO, &key(peer), Standing::default())
                    .is_some(),
                hit,
                "{peer}"
            );
        }
    }

    #[test]
    fn an_allow_ends_with_its_lease_and_a_deny_does_not() {
        let mut cache = cache();
        put(&mut cache, &verdict(VerdictAction::Allow, "10.0.0.1", "80"), None);
        put(&mut cache, &verdict(VerdictAction::Deny, "10.0.0.2", "80"), None);
        let late = Duration::from_secs(61);
        assert!(
            cache
                .lookup(late, &key("10.0.0.1:80"), Standing::default())
                .is_none()
        );
        assert!(
            cache
                .lookup(late, &key("10.0.0.2:80"), Standing::default())
                .is_some()
        );
        cache.renew(
            Epoch {
                incarnation: 2,
                counter: 1,
            },
            Duration::from_secs(99),
        );
        assert!(
            cache
                .lookup(late, &key("10.0.0.1:80"), Standing::default())
                .is_none(),
            "another incarnation renews nothing"
        );
        cache.renew(EPOCH, Duration::from_secs(99));
        assert!(
            cache
                .lookup(late, &key("10.0.0.1:80"), Standing::default())
                .is_some()
        );
    }

    #[test]
    fn revocation_and_expiry_end_entries() {
        let mut cache = cache();
        let mut timed = verdict(VerdictAction::Allow, "10.0.0.1", "80");
        timed.expires_in = Some(Duration::from_secs(5));
        put(&mut cache, &timed, None);
        assert!(
            cache
                .lookup(
                    Duration::from_millis(4999),
                    &key("10.0.0.1:80"),
                    Standing::default()
                )
                .is_some()
        );
        assert!(
            cache
                .lookup(Duration::from_secs(5), &key("10.0.0.1:80"), Standing::default())
                .is_none()
        );
        cache.revoke(EPOCH.next());
        assert_eq!(cache.len(), 0);
    }

    #[test]
    fn a_change_of_names_ends_what_looked_at_them() {
        let mut cache = cache();
        let mut named = verdict(VerdictAction::Deny, "10.0.0.1", "80");
        if let Match::Flow(found) = &mut named.found {
            found.names_consulted = true;
        }
        put(&mut cache, &named, None);
        put(&mut cache, &verdict(VerdictAction::Deny, "10.0.0.1", "81"), None);
        cache.forget_address("10.0.0.1".parse().unwrap());
        assert!(
            cache
                .lookup(Time::ZERO, &key("10.0.0.1:80"), Standing::default())
                .is_none()
        );
        assert!(
            cache
                .lookup(Time::ZERO, &key("10.0.0.1:81"), Standing::default())
                .is_some()
        );
        assert_eq!(cache.len(), 1);
    }

    #[test]
    fn no_match_reaches_across_a_guard_or_to_another_guest_or_to_what_is_dialled_elsewhere() {
        let mut cache = cache();
        put(
            &mut cache,
            &verdict(VerdictAction::Allow, "10.0.0.0/8", "*"),
            None,
        );
        let host = Standing {
            guards: GuardSet::EMPTY.with(vnet_proto::model::Guard::Host),
            ..Standing::default()
        };
        let guest = Standing {
            neighbour: Some(VmId(2)),
            ..Standing::default()
        };
        let moved = Standing {
            moved: Some("192.0.2.1".parse().unwrap()),
            ..Standing::default()
        };
        for other in [host, guest, moved] {
            assert!(cache.lookup(Time::ZERO, &key("10.1.2.3:80"), other).is_none());
        }
        assert!(
            cache
                .lookup(Time::ZERO, &key("10.1.2.3:80"), Standing::default())
                .is_some()
        );
    }

    #[test]
    fn too_many_shapes_narrow_to_the_flow_that_missed() {
        let mut cache = cache();
        for length in 8..8 + SHAPES_MAX {
            put(
                &mut cache,
                &verdict(VerdictAction::Allow, &format!("10.0.0.0/{length}"), "*"),
                None,
            );
        }
        let flow = key("172.16.0.1:22");
        put(
            &mut cache,
            &verdict(VerdictAction::Allow, "172.16.0.0/24", "*"),
            Some(&flow),
        );
        assert!(cache.lookup(Time::ZERO, &flow, Standing::default()).is_some());
        assert!(
            cache
                .lookup(Time::ZERO, &key("172.16.0.1:23"), Standing::default())
                .is_none()
        );
        assert!(cache.shapes.len() <= SHAPES_MAX + 1);
    }

    #[test]
    #[ignore = "a measurement: cargo test --release -p vnet-dataplane --lib -- --ignored --nocapture a_look_up"]
    fn a_look_up_takes_the_same_whatever_else_is_there() {
        const LOOKUPS: u32 = 2_000_000;
        // Addresses in order, and ones that differ in their highest bits first, as of who picks them to collide.
        let measured = |entries: u32, adversarial: bool| {
            let address = |n: u32| match adversarial {
                true => Ipv4Addr::from(n.reverse_bits()),
                false => Ipv4Addr::from(0x0a00_0000 + n),
            };
            let mut cache = cache();
            for n in 0..entries {
                put(
                    &mut cache,
                    &verdict(VerdictAction::Deny, &address(n).to_string(), "80"),
                    None,
                );
            }
            let keys: Vec<FlowKey> = (0..1_000)
                .map(|n| key(&format!("{}:80", address(n * entries / 1_000))))
                .collect();
            let began = std::time::Instant::now();
            for n in 0..LOOKUPS {
                let flow = &keys[n as usize % keys.len()];
                assert!(cache.lookup(Time::ZERO, flow, Standing::default()).is_some());
            }
            began.elapsed() / LOOKUPS
        };
        let one = measured(1, false);
        for adversarial in [false, true] {
            let many = measured(100_000, adversarial);
            println!("{one:?} beside nothing, {many:?} beside 100,000 (adversarial: {adversarial})");
            // Memory that is not in the processor's caches costs a few times what is.
            assert!(many < one * 8, "{one:?}, then {many:?}");
        }
    }

    #[test]
    fn the_oldest_entries_go_at_the_limit() {
        let mut cache = cache();
        for i in 0..FLOW_ENTRIES_MAX as u32 + 10 {
            let address = Ipv4Addr::from(0x0a00_0000 + i).to_string();
            put(&mut cache, &verdict(VerdictAction::Deny, &address, "80"), None);
        }
        assert_eq!(cache.len(), FLOW_ENTRIES_MAX);
        assert_eq!(cache.evictions, 10);
        assert!(
            cache
                .lookup(Time::ZERO, &key("10.0.0.0:80"), Standing::default())
                .is_none()
        );
        assert!(
            cache
                .lookup(Time::ZERO, &key("10.0.0.10:80"), Standing::default())
                .is_some()
        );
    }

    #[test]
    fn the_index_of_addresses_stays_as_small_as_the_cache() {
        let mut cache = cache();
        for i in 0..FLOW_ENTRIES_MAX as u32 + 500 {
            let mut named = verdict(
                VerdictAction::Deny,
                &Ipv4Addr::from(0x0a00_0000 + i).to_string(),
                "80",
            );
            if let Match::Flow(found) = &mut named.found {
                found.names_consulted = true;
            }
            put(&mut cache, &named, None);
            put(&mut cache, &named, None);
        }
        assert!(cache.len() <= FLOW_ENTRIES_MAX);
        assert_eq!(cache.by_address.len(), cache.len());
        assert!(cache.by_address.values().all(|places| places.len() == 1));
    }

    #[test]
    fn names_are_found_exactly_below_and_at_large() {
        let mut cache = cache();
        let mut named = verdict(VerdictAction::Allow, "10.0.0.1", "80");
        named.found = Match::Lookup(LookupMatch::Subdomains("example.com".parse().unwrap()));
        put(&mut cache, &named, None);
        let found =
            |cache: &Cache, name: &str| cache.lookup_name(Time::ZERO, &name.parse().unwrap()).is_some();
        assert!(
            found(&cache, "a.b.example.com") && !found(&cache, "example.com") && !found(&cache, "x.test")
        );
        named.found = Match::Lookup(LookupMatch::Any);
        put(&mut cache, &named, None);
        assert!(found(&cache, "x.test"));
    }

    #[test]
    fn what_holds_for_lookups_holds_for_no_alias_and_the_other_way_round() {
        let name: Name = "x.test".parse().unwrap();
        let mut named = verdict(VerdictAction::Allow, "10.0.0.1", "80");
        for alias in [false, true] {
            let mut cache = cache();
            named.found = if alias {
                Match::Alias(LookupMatch::Any)
            } else {
                Match::Lookup(LookupMatch::Any)
            };
            put(&mut cache, &named, None);
            assert_eq!(cache.lookup_name(Time::ZERO, &name).is_some(), !alias);
            assert_eq!(cache.lookup_alias(Time::ZERO, &name).is_some(), alias);
            assert!(cache.lookup_alias(Duration::from_secs(61), &name).is_none());
            cache.revoke(EPOCH.next());
            assert!(cache.lookup_alias(Time::ZERO, &name).is_none());
        }
    }
}
