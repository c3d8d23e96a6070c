//! A suggestion before it is written: which rules, in which order, and what they are to be tested by.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use vnet_proto::model::{Name, NamePattern, Protocol};

use super::facts::{Destination, Fact, Facts};
use crate::policy::{Outcome, RuleAction};

/// From so many names below a registrable domain on, they are one pattern.
const FOLD_FROM: usize = 2;
/// Destinations in the tests of a suggestion.
pub(super) const PROBES_MAX: usize = 1_000;

/// A way to write a history down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Way {
    /// Names below one registrable domain become one pattern.
    fold: bool,
    /// Rules are for the VM that did it, rather than for all.
    per_vm: bool,
}

impl Way {
    /// All of them, the one whose file is shortest first.
    pub(super) const ALL: [Self; 4] = [
        Self {
            fold: true,
            per_vm: false,
        },
        Self {
            fold: false,
            per_vm: false,
        },
        Self {
            fold: true,
            per_vm: true,
        },
        Self {
            fold: false,
            per_vm: true,
        },
    ];
}

/// One rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PlannedRule {
    pub(super) name: String,
    pub(super) action: RuleAction,
    pub(super) vm: Option<String>,
    pub(super) protocol: Option<Protocol>,
    /// Empty: any.
    pub(super) ports: Vec<(u16, u16)>,
    pub(super) places: Places,
    pub(super) comment: String,
}

/// What a rule is about, with a word on each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Places {
    Names(Vec<(String, String)>),
    Addresses(Vec<(String, String)>),
}

/// A destination to test, and what it must come to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Probe {
    pub(super) vm: Option<String>,
    pub(super) text: String,
    pub(super) expected: Outcome,
}

/// What is to be written.
#[derive(Debug, Clone, Default)]
pub(super) struct Plan {
    /// What nothing decides is asked.
    pub(super) asks: bool,
    /// Names get synthetic addresses.
    pub(super) synthetic: bool,
    pub(super) rules: Vec<PlannedRule>,
    /// Names that are looked up and not connected to.
    pub(super) lookups: Vec<(String, String)>,
    pub(super) probes: Vec<Probe>,
}

/// A rule's subject but for its places: VM, protocol, ports.
type Bucket = (Option<String>, Protocol, BTreeSet<u16>);

/// The ports of a VM's places, by protocol, and how many flows there were.
type PortsOf<P> = BTreeMap<(Option<String>, Protocol, P), (BTreeSet<u16>, u64)>;

impl Plan {
    pub(super) fn make(facts: &Facts, way: Way) -> Self {
        Maker::new(facts, way).make()
    }
}

struct Maker<'a> {
    facts: &'a Facts,
    way: Way,
    /// What became of lookups, where it was not an allow.
    refused_names: BTreeSet<(Option<String>, &'a Name)>,
}

impl<'a> Maker<'a> {
    fn new(facts: &'a Facts, way: Way) -> Self {
        let mut maker = Self {
            facts,
            way,
            refused_names: BTreeSet::new(),
        };
        for fact in facts.iter() {
            if let Destination::Lookup(name) = &fact.destination
                && fact.outcome != Outcome::Allow
            {
                maker.refused_names.insert((maker.group(fact), name));
            }
        }
        maker
    }

    fn group(&self, fact: &Fact) -> Option<String> {
        self.way.per_vm.then(|| fact.vm.clone())
    }

    fn make(&self) -> Plan {
        let is = |fact: &&Fact, outcome| fact.outcome == outcome;
        let by_default = |outcome| {
            self.facts
                .iter()
                .any(|fact| is(&fact, outcome) && fact.by_default)
        };
        let asks = by_default(Outcome::Ask) && !by_default(Outcome::Deny);
        let mut plan = Plan {
            asks,
            synthetic: self.facts.have_synthetic(),
            ..Plan::default()
        };
        // By address, and before all that allows: so they say nothing of any name.
        let mut refused = Vec::new();
        for (outcome, action) in [(Outcome::Drop, RuleAction::Drop), (Outcome::Ask, RuleAction::Ask)] {
            let theirs = self.facts.iter().filter(|fact| is(fact, outcome));
            let theirs: Vec<&Fact> = theirs.filter(|fact| !(asks && fact.by_default)).collect();
            self.addresses(&mut plan, &theirs, action);
            refused.push((theirs, action));
        }
        let allowed: Vec<&Fact> = self
            .facts
            .iter()
            .filter(|fact| is(fact, Outcome::Allow))
            .collect();
        let (named, addressed): (Vec<&Fact>, Vec<&Fact>) =
            allowed.iter().partition(|fact| !self.names_of(fact).is_empty());
        let covered = self.names(&mut plan, &named);
        self.addresses(&mut plan, &addressed, RuleAction::Allow);
        // These match connections to the names as well, and so come after what allows any.
        for (facts, action) in &refused {
            self.names_alone(&mut plan, facts, *action);
        }
        self.lookups(&mut plan, &allowed, &covered);
        self.probe(&mut plan);
        plan
    }

    /// The names that flows are allowed by, and how many by each: of those that may be looked up, the newest.
    fn names_of(&self, fact: &'a Fact) -> BTreeMap<&'a Name, u64> {
        let mut names = BTreeMap::new();
        if !matches!(&fact.destination, Destination::Flow { guarded: false, .. }) {
            return names;
        }
        let group = self.group(fact);
        let usable =
            |name: &&Name| is_writable(name) && !self.refused_names.contains(&(group.clone(), *name));
        for (order, count) in &fact.orders {
            if let Some(name) = order.iter().find(usable) {
                *names.entry(name).or_default() += count;
            }
        }
        names
    }

    fn names(&self, plan: &mut Plan, facts: &[&'a Fact]) -> BTreeSet<(Option<String>, NamePattern)> {
        let mut ports: PortsOf<&Name> = BTreeMap::new();
        for fact in facts {
            let Destination::Flow { protocol, port, .. } = &fact.destination else {
                continue;
            };
            for (name, count) in self.names_of(fact) {
                let entry = ports.entry((self.group(fact), *protocol, name)).or_default();
                entry.0.insert(*port);
                entry.1 += count;
            }
        }
        let mut buckets: BTreeMap<Bucket, BTreeMap<&Name, u64>> = BTreeMap::new();
        for ((group, protocol, name), (ports, count)) in ports {
            buckets
                .entry((group, protocol, ports))
                .or_default()
                .insert(name, count);
        }
        let mut covered = BTreeSet::new();
        for ((group, protocol, ports), names) in buckets {
            let folded = self.fold(&group, &names);
            covered.extend(folded.keys().map(|pattern| (group.clone(), pattern.clone())));
            let entry = |(pattern, (count, names)): (&NamePattern, &(u64, usize))| {
                let of = if *names > 1 {
                    format!(" to {names} names")
                } else {
                    String::new()
                };
                (pattern.to_string(), format!("{}{of}", flows(*count)))
            };
            plan.rules.push(PlannedRule {
                name: label(plan, "names", &group, protocol, &ports),
                action: RuleAction::Allow,
                vm: group,
                protocol: Some(protocol),
                ports: runs(&ports),
                places: Places::Names(folded.iter().map(entry).collect()),
                comment: String::new(),
            });
        }
        covered
    }

    /// Names as patterns, each with its count and how many names it stands for.
    fn fold(
        &self,
        group: &Option<String>,
        names: &BTreeMap<&Name, u64>,
    ) -> BTreeMap<NamePattern, (u64, usize)> {
        let mut below: BTreeMap<Name, Vec<&Name>> = BTreeMap::new();
        for name in names.keys() {
            if let Some(domain) = registrable(name).filter(|domain| name.is_below(domain)) {
                below.entry(domain).or_default().push(name);
            }
        }
        let folds = |domain: &Name, names: &[&Name]| {
            self.way.fold && names.len() >= FOLD_FROM && !self.is_contradicted(group, domain)
        };
        below.retain(|domain, names| folds(domain, names));
        let mut patterns: BTreeMap<NamePattern, (u64, usize)> = BTreeMap::new();
        for (name, count) in names {
            let folded =
                registrable(name).filter(|domain| name.is_below(domain) && below.contains_key(domain));
            let pattern = match folded {
                Some(domain) => NamePattern::Subdomains(domain),
                None => NamePattern::Exact((*name).clone()),
            };
            let entry = patterns.entry(pattern).or_default();
            entry.0 += count;
            entry.1 += 1;
        }
        patterns
    }

    /// Whether something below a domain was not let through.
    fn is_contradicted(&self, group: &Option<String>, domain: &Name) -> bool {
        let of_group = |fact: &&Fact| group.as_ref().is_none_or(|vm| fact.vm == *vm);
        let mut others = self
            .facts
            .iter()
            .filter(of_group)
            .filter(|f| f.outcome != Outcome::Allow);
        others.any(|fact| match &fact.destination {
            Destination::Lookup(name) => name.is_below(domain),
            Destination::Flow { names, .. } => names.iter().any(|name| name.is_below(domain)),
        })
    }

    fn addresses(&self, plan: &mut Plan, facts: &[&Fact], action: RuleAction) {
        let mut ports: PortsOf<IpAddr> = BTreeMap::new();
        for fact in facts {
            if let Destination::Flow {
                protocol,
                address,
                port,
                synthetic: false,
                ..
            } = &fact.destination
            {
                let entry = ports.entry((self.group(fact), *protocol, *address)).or_default();
                entry.0.insert(*port);
                entry.1 += fact.count;
            }
        }
        let mut buckets: BTreeMap<Bucket, Vec<(String, String)>> = BTreeMap::new();
        for ((group, protocol, address), (ports, count)) in ports {
            let prefix = ipnet::IpNet::from(address).to_string();
            buckets
                .entry((group, protocol, ports))
                .or_default()
                .push((prefix, flows(count)));
        }
        for ((group, protocol, ports), places) in buckets {
            let kind = match action {
                RuleAction::Allow => "addresses".to_owned(),
                other => format!("{other}-addresses"),
            };
            plan.rules.push(PlannedRule {
                name: label(plan, &kind, &group, protocol, &ports),
                action,
                vm: group,
                protocol: Some(protocol),
                ports: runs(&ports),
                places: Places::Addresses(places),
                comment: String::new(),
            });
        }
    }

    /// Rules about names whose lookups were asked for or dropped.
    fn names_alone(&self, plan: &mut Plan, facts: &[&Fact], action: RuleAction) {
        let mut names: BTreeMap<Option<String>, Vec<(String, String)>> = BTreeMap::new();
        for fact in facts {
            if let Destination::Lookup(name) = &fact.destination
                && is_writable(name)
            {
                let entry = (name.to_string(), lookups(fact.count));
                names.entry(self.group(fact)).or_default().push(entry);
            }
        }
        for (group, mut places) in names {
            places.dedup_by(|a, b| a.0 == b.0);
            plan.rules.push(PlannedRule {
                name: unique(plan, format!("{action}-names")),
                action,
                vm: group,
                protocol: None,
                ports: Vec::new(),
                places: Places::Names(places),
                comment: String::new(),
            });
        }
    }

    /// Names that are looked up, and not connected to under any rule so far.
    fn lookups(
        &self,
        plan: &mut Plan,
        facts: &[&'a Fact],
        covered: &BTreeSet<(Option<String>, NamePattern)>,
    ) {
        let mut alone: BTreeMap<&Name, u64> = BTreeMap::new();
        for fact in facts {
            let Destination::Lookup(name) = &fact.destination else {
                continue;
            };
            let group = self.group(fact);
            let is_covered = covered
                .iter()
                .any(|(of, pattern)| *of == group && pattern.matches(name));
            if is_writable(name) && !is_covered {
                *alone.entry(name).or_default() += fact.count;
            }
        }
        if alone.is_empty() {
            return;
        }
        let entry = |(pattern, (count, names)): (&NamePattern, &(u64, usize))| {
            let of = if *names > 1 {
                format!(" of {names} names")
            } else {
                String::new()
            };
            (pattern.to_string(), format!("{}{of}", lookups(*count)))
        };
        plan.lookups = self.fold(&None, &alone).iter().map(entry).collect();
        // Names in dns.allowedDomains open every port of their addresses; these were never connected to.
        plan.rules.push(PlannedRule {
            name: unique(plan, "looked-up-only".to_owned()),
            action: RuleAction::Deny,
            vm: None,
            protocol: None,
            ports: vec![(1, u16::MAX)],
            places: Places::Names(plan.lookups.clone()),
            comment: "these are looked up, and were not connected to".to_owned(),
        });
    }

    fn probe(&self, plan: &mut Plan) {
        let mut seen = BTreeSet::new();
        for fact in self.facts.iter() {
            let vm = self.group(fact);
            let hosts: Vec<String> = match &fact.destination {
                Destination::Lookup(name) if is_writable(name) => vec![name.to_string()],
                Destination::Lookup(_) => continue,
                Destination::Flow {
                    protocol,
                    address,
                    names,
                    ..
                } => {
                    let allowed_by = self.names_of(fact);
                    match fact.outcome == Outcome::Allow && !allowed_by.is_empty() {
                        true => allowed_by.keys().map(ToString::to_string).collect(),
                        // An address that is bound to a name is not the address alone.
                        false if fact.outcome != Outcome::Allow && !names.is_empty() => continue,
                        false if address.is_ipv6() && protocol.has_ports() => vec![format!("[{address}]")],
                        false => vec![address.to_string()],
                    }
                }
            };
            let expected = match fact.outcome {
                Outcome::Drop => Outcome::Deny,
                other => other,
            };
            for host in hosts {
                let text = match &fact.destination {
                    Destination::Lookup(_) => format!("domain {host}"),
                    Destination::Flow { protocol, port, .. } if protocol.has_ports() => {
                        format!("{protocol} {host}:{port}")
                    }
                    Destination::Flow { protocol, .. } => format!("{protocol} {host}"),
                };
                if plan.probes.len() < PROBES_MAX && seen.insert((vm.clone(), text.clone())) {
                    let vm = vm.clone();
                    plan.probes.push(Probe { vm, text, expected });
                }
            }
        }
        plan.probes.push(Probe {
            vm: None,
            text: "domain not-recorded.invalid".to_owned(),
            expected: if plan.asks { Outcome::Ask } else { Outcome::Deny },
        });
    }
}

/// Whether a policy file can say a name: what guests look up may hold any byte.
fn is_writable(name: &Name) -> bool {
    name.as_str().parse::<Name>().is_ok_and(|read| read == *name)
}

/// The registrable domain (public suffix list) of a name.
fn registrable(name: &Name) -> Option<Name> {
    psl::domain_str(name.as_str()).and_then(|domain| Name::from_canonical(domain).ok())
}

/// Ports as ranges that hold these and no others.
fn runs(ports: &BTreeSet<u16>) -> Vec<(u16, u16)> {
    let mut runs: Vec<(u16, u16)> = Vec::new();
    for port in ports.iter().copied().filter(|port| *port != 0) {
        match runs.last_mut() {
            Some((_, last)) if *last + 1 == port => *last = port,
            _ => runs.push((port, port)),
        }
    }
    runs
}

fn label(
    plan: &Plan,
    kind: &str,
    group: &Option<String>,
    protocol: Protocol,
    ports: &BTreeSet<u16>,
) -> String {
    let mut label = kind.to_owned();
    if let Some(vm) = group {
        label = format!("{vm}-{label}");
    }
    label = format!("{label}-{protocol}");
    if let (1, Some(port)) = (ports.len(), ports.first())
        && protocol.has_ports()
    {
        label = format!("{label}-{port}");
    }
    unique(plan, label)
}

/// A rule's name that no other has.
fn unique(plan: &Plan, label: String) -> String {
    let taken = |name: &str| plan.rules.iter().any(|rule| rule.name == name);
    if !taken(&label) {
        return label;
    }
    // Ends: there are fewer rules than numbers.
    (2u64..)
        .map(|n| format!("{label}-{n}"))
        .find(|name| !taken(name))
        .unwrap_or(label)
}

fn flows(count: u64) -> String {
    if count == 1 {
        "1 flow".to_owned()
    } else {
        format!("{count} flows")
    }
}

fn lookups(count: u64) -> String {
    if count == 1 {
        "1 lookup".to_owned()
    } else {
        format!("{count} lookups")
    }
}
