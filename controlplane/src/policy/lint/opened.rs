//! What a rule opens by naming guards, which an earlier and broader one that names none leaves to it.
//!
//! It is found as the evaluator would find it, by destinations of which one stands for all that are like it: an
//! address of each prefix, with the guards that it may be under, at the ports that matter to the guard of DNS.

use std::cell::{Cell, OnceCell};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use ipnet::IpNet;
use vnet_proto::model::special::judged;
use vnet_proto::model::{FlowKey, FlowSubject, Guard, GuardSet, Name, NamePattern, Protocol};

use crate::policy::guard::GuardedRanges;
use crate::policy::region::Region;
use crate::policy::resolvers::{PORTS, Resolvers};
use crate::policy::{DnsGuard, FlowTest, GuardAction, Policy, ProtocolSet, Rule, Settings};

/// Destinations that are looked at for one rule. One with more is taken to open something.
const CANDIDATES_MAX: usize = 2_000;

/// Of those, the ones that it opens by naming their guards.
const SAMPLES_MAX: usize = 64;

/// Earlier rules that those are compared with. After so many it is taken to open something.
const COMPARISONS_MAX: u32 = 16;

/// Names of a list that are looked at for those of resolvers.
const NAMES_MAX: usize = 1_000;

/// A port that no guard is about.
const ORDINARY_PORT: u16 = 443;

/// What settings say of one guard.
type Said = fn(&Settings) -> Option<GuardAction>;

/// The guards that a document leaves standing, for some VM at least.
pub(super) struct Guards<'a> {
    ranges: GuardedRanges,
    kept: GuardSet,
    resolvers: Option<&'a Resolvers>,
}

impl<'a> Guards<'a> {
    pub(super) fn of(policy: &'a Policy) -> Self {
        let profiles = policy.profiles.iter().map(|profile| &profile.settings);
        let kept = |said: Said| {
            let off = Some(GuardAction::Off);
            let mut profiles = profiles.clone().filter_map(said);
            said(&policy.settings) != off || profiles.any(|said| Some(said) != off)
        };
        let said: [(Guard, Said); 4] = [
            (Guard::Metadata, |settings| settings.metadata),
            (Guard::Host, |settings| settings.host),
            (Guard::PrivateFromDns, |settings| settings.private_from_dns),
            (Guard::Guest, |settings| settings.guests),
        ];
        let standing = said.into_iter().filter(|(_, said)| kept(*said));
        let dns = policy.settings.dns_guard != Some(DnsGuard::Off)
            || profiles
                .clone()
                .any(|said| said.dns_guard.is_some_and(|said| said != DnsGuard::Off));
        Self {
            ranges: GuardedRanges::new([], []),
            kept: standing.map(|(guard, _)| guard).collect(),
            resolvers: dns.then_some(&*policy.resolvers),
        }
    }

    fn only_kept(&self, guards: GuardSet) -> GuardSet {
        guards.iter().filter(|guard| self.kept.contains(*guard)).collect()
    }

    /// Guards that an address of a prefix is under wherever vnet runs.
    fn always(&self, address: IpAddr) -> GuardSet {
        self.only_kept(self.ranges.guards_of(address, false))
    }

    /// Those that it may be under as well: where DNS taught it; where it is the host's or a guest's, which only
    /// that very address is known to name.
    fn at_most(&self, prefix: IpNet, address: IpAddr) -> GuardSet {
        let guards = self.ranges.guards_of(address, true);
        let one = prefix == IpNet::from(address);
        let guards = if one {
            guards.with(Guard::Host).with(Guard::Guest)
        } else {
            guards
        };
        self.only_kept(guards)
    }

    /// How a flow leads to another DNS server: `None` where it does not, else whether a test names it.
    fn names_dns(&self, test: &FlowTest, flow: &FlowSubject) -> Option<bool> {
        let mut region = Region::around(flow, &self.ranges);
        let resolvers = self.resolvers?;
        let way = resolvers.way(flow, &mut region)?;
        Some(resolvers.is_named(way, test, flow, &mut region))
    }

    fn names_guards(&self, test: &FlowTest, flow: &FlowSubject) -> bool {
        let address = flow.key.peer.ip();
        let mut holding = test.prefixes.holding(address);
        flow.guards.is_empty()
            || holding.any(|prefix| self.ranges.names_all(flow.guards, prefix, address, flow.dialled))
    }

    /// Whether a test that covers a flow opens it.
    fn opens(&self, test: &FlowTest, flow: &FlowSubject) -> bool {
        self.names_guards(test, flow) && self.names_dns(test, flow).unwrap_or(true)
    }

    fn is_under_any(&self, test: &FlowTest, flow: &FlowSubject) -> bool {
        !flow.guards.is_empty() || self.names_dns(test, flow).is_some()
    }
}

/// What one rule opens by naming guards.
pub(super) struct Opened<'a> {
    rule: &'a Rule,
    guards: &'a Guards<'a>,
    /// Destinations of that kind; `None`: too many to tell.
    samples: OnceCell<Option<Vec<FlowSubject>>>,
    /// Names of resolvers that it has, whose lookups it opens.
    names: OnceCell<Vec<Name>>,
    compared: Cell<u32>,
}

impl<'a> Opened<'a> {
    pub(super) fn new(rule: &'a Rule, guards: &'a Guards<'a>) -> Self {
        Self {
            rule,
            guards,
            samples: OnceCell::new(),
            names: OnceCell::new(),
            compared: Cell::new(0),
        }
    }

    /// Whether there is something that an earlier rule, which covers it, does not open.
    pub(super) fn beyond(&self, earlier: &Rule) -> bool {
        self.compared.set(self.compared.get().saturating_add(1));
        let Some(samples) = self.samples.get_or_init(|| self.find()) else {
            return true;
        };
        if self.compared.get() > COMPARISONS_MAX {
            return true;
        }
        let lookups = earlier
            .test
            .names
            .as_ref()
            .is_some_and(|names| !self.resolver_names().iter().all(|name| names.has_exact(name)));
        lookups || samples.iter().any(|flow| !self.guards.opens(&earlier.test, flow))
    }

    /// Whether all that it is for is under guards.
    pub(super) fn is_all(&self) -> bool {
        let test = &self.rule.test;
        let guards = self.guards;
        let known = |prefix: IpNet| guards.resolvers.is_some_and(|all| all.addresses().covers(prefix));
        let ported = ProtocolSet::TCP_UDP.has_all(test.protocols);
        let guarded = |prefix: IpNet| {
            let always = guards.always(prefix.addr());
            let inside = guards
                .ranges
                .names_all(always, prefix, prefix.addr(), prefix.addr());
            !always.is_empty() && inside || ported && known(prefix)
        };
        let mut ports = test.ports.ranges().iter();
        let of_dns = ports.all(|range| range.first() == range.last() && PORTS.contains(&range.first()));
        let prefixes = !test.prefixes.is_empty() && test.prefixes.len() <= CANDIDATES_MAX;
        guards.resolvers.is_some() && !test.ports.is_empty() && of_dns
            || prefixes && test.prefixes.iter().all(guarded)
    }

    /// The names of resolvers that the rule has as they are.
    fn resolver_names(&self) -> &[Name] {
        self.names.get_or_init(|| {
            let (Some(names), Some(resolvers)) = (&self.rule.test.names, self.guards.resolvers) else {
                return Vec::new();
            };
            let exact = |pattern: NamePattern| match pattern {
                NamePattern::Exact(name) => Some(name),
                NamePattern::Subdomains(_) => None,
            };
            // Whichever list is the short one.
            let found: Vec<Name> = if names.len() <= NAMES_MAX {
                names.patterns().filter_map(exact).collect()
            } else {
                let all = resolvers.names().patterns().take(NAMES_MAX);
                all.filter_map(exact).collect()
            };
            let both = |name: &Name| names.has_exact(name) && resolvers.names().contains(name);
            found.into_iter().filter(both).collect()
        })
    }

    fn find(&self) -> Option<Vec<FlowSubject>> {
        let test = &self.rule.test;
        let protocol = *Protocol::ALL.iter().find(|one| test.protocols.contains(**one))?;
        let names = self.resolver_names();
        let mut found = Vec::new();
        for (candidates, (prefix, address)) in self.addresses(names).enumerate() {
            if candidates >= CANDIDATES_MAX || found.len() >= SAMPLES_MAX {
                return None;
            }
            let ordinary = test
                .ports
                .ranges()
                .first()
                .map_or(ORDINARY_PORT, |range| range.first());
            let of_dns = PORTS.into_iter().filter(|port| {
                protocol.has_ports() && (test.ports.is_empty() || test.ports.range_of(*port).is_some())
            });
            for port in std::iter::once(ordinary).chain(of_dns) {
                let port = if protocol.has_ports() { port } else { 0 };
                let always = self.guards.always(address);
                let at_most = prefix.map_or(always, |prefix| self.guards.at_most(prefix, address));
                let flow = |guards| FlowSubject {
                    key: FlowKey {
                        protocol,
                        guest: SocketAddr::new(address, 0),
                        peer: SocketAddr::new(address, port),
                    },
                    dialled: address,
                    names: names.to_vec(),
                    guards,
                    peer_vm: None,
                };
                let both = [flow(always), flow(at_most)].into_iter();
                let opened = |flow: &FlowSubject| {
                    self.guards.is_under_any(test, flow) && self.guards.opens(test, flow)
                };
                found.extend(both.filter(opened));
            }
        }
        Some(found)
    }

    /// An address of each of its prefixes; where it has names of resolvers, their addresses as well.
    fn addresses(&self, names: &[Name]) -> impl Iterator<Item = (Option<IpNet>, IpAddr)> + '_ {
        let test = &self.rule.test;
        let anywhere = test.prefixes.is_empty();
        let some = anywhere.then_some((None, IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1))));
        let own = test
            .prefixes
            .iter()
            .map(|prefix| (Some(prefix), judged(prefix.addr())));
        let resolvers = self.guards.resolvers.filter(|_| !names.is_empty());
        let known = resolvers.into_iter().flat_map(|all| all.addresses().iter());
        let known = known.map(|range| range.addr());
        let known = known.filter(move |address| anywhere || test.prefixes.contains(*address));
        some.into_iter()
            .chain(own)
            .chain(known.map(|address| (None, address)))
    }
}
