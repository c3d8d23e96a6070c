//! Rules in order, and which of them a flow or lookup could match, without looking at each.
//!
//! The first match among the candidates is the first match of all. Rules that are no candidates fail, and
//! the region must keep clear of what would make one of them match; only those before the match count,
//! since only they would have answered first. Where finding the widest such region would take long, a
//! narrower one is given: that is always safe, and costs another miss at worst.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use vnet_proto::model::special::judged;
use vnet_proto::model::{FlowSubject, Guard, LookupMatch, Name, NamePattern};

use crate::policy::names::{NameTable, clear_around, narrower};
use crate::policy::patterns::NamePatterns;
use crate::policy::prefixes::PrefixTable;
use crate::policy::region::{FlowTest, Region};
use crate::policy::{NameSet, PortSet, ProtocolSet, Rule};

/// Prefixes or patterns of a rule that are entered one by one. Larger lists answer for themselves.
const ENTERED_MAX: usize = 64;

/// Neighbours that are looked at to keep a region wide.
const NEIGHBOURS_MAX: usize = 256;

/// Which rules of a list are for a VM, and not over.
#[derive(Debug, Clone)]
pub(crate) struct Applies(Option<Box<[u64]>>);

impl Applies {
    /// Of `rules`, those that `chosen` chooses.
    pub(crate) fn of(rules: &[Arc<Rule>], chosen: impl Fn(&Rule) -> bool) -> Self {
        let mut bits = vec![0u64; rules.len().div_ceil(64)];
        let mut all = true;
        for (index, rule) in rules.iter().enumerate() {
            if chosen(rule) {
                bits[index / 64] |= 1 << (index % 64);
            } else {
                all = false;
            }
        }
        Self((!all).then(|| bits.into()))
    }

    /// Whether the rule of an index is among them.
    pub(crate) fn has(&self, index: u32) -> bool {
        let Some(bits) = &self.0 else { return true };
        let word = bits.get(index as usize / 64).copied().unwrap_or(0);
        word >> (index % 64) & 1 != 0
    }
}

/// Rules in order, with their indexes. Shared by all VMs under one document.
#[derive(Debug, Default)]
pub struct RuleList {
    rules: Vec<Arc<Rule>>,
    /// Of rules with few prefixes: the prefixes, and for each the rules that have it, in order.
    prefixes: PrefixTable,
    having: Vec<Vec<u32>>,
    /// Of rules with names that are not found by a prefix.
    names: NameIndex,
    /// Their protocols and ports, with the first rule that has both. These read the names of a flow.
    shapes: Vec<Shape>,
    /// What is neither.
    others: Vec<u32>,
    /// Of rules that decide lookups.
    lookups: NameIndex,
    /// Whether one of these refuses.
    refuses_lookups: bool,
}

#[derive(Debug)]
struct Shape {
    protocols: ProtocolSet,
    ports: PortSet,
    first: u32,
}

impl RuleList {
    /// In the order given.
    pub fn new(rules: Vec<Arc<Rule>>) -> Self {
        let mut by_prefix: HashMap<ipnet::IpNet, Vec<u32>> = HashMap::new();
        let mut shapes: HashMap<(u8, PortSet), u32> = HashMap::new();
        let mut list = Self::default();
        for (rule, index) in rules.iter().zip(0u32..) {
            if rule.is_for_lookups()
                && let Some(names) = &rule.test.names
            {
                list.lookups.add(index, names);
                list.refuses_lookups |= rule.action.refuses();
            }
            if rule.lookup_only {
                continue;
            }
            let test = &rule.test;
            match &test.names {
                _ if (1..=ENTERED_MAX).contains(&test.prefixes.len()) => {
                    for prefix in test.prefixes.iter() {
                        let having = by_prefix.entry(prefix).or_default();
                        if having.last() != Some(&index) {
                            having.push(index);
                        }
                    }
                }
                Some(names) => {
                    list.names.add(index, names);
                    let shape = (test.protocols.bits(), test.ports.clone());
                    shapes.entry(shape).or_insert(index);
                }
                None => list.others.push(index),
            }
        }
        list.prefixes = by_prefix.keys().copied().collect();
        let having = list.prefixes.as_slice().iter();
        list.having = having.map(|p| by_prefix.remove(p).unwrap_or_default()).collect();
        list.shapes = shapes
            .into_iter()
            .map(|((protocols, ports), first)| Shape {
                protocols: ProtocolSet::from_bits(protocols),
                ports,
                first,
            })
            .collect();
        list.rules = rules;
        list
    }

    /// The rules, in order.
    pub fn as_slice(&self) -> &[Arc<Rule>] {
        &self.rules
    }

    /// Whether any of the rules refuses lookups, whomever it is for.
    pub(crate) fn refuses_lookups(&self) -> bool {
        self.refuses_lookups
    }

    /// The first rule of those that apply that `matches`, which is asked of every rule that could match
    /// the flow, in order. Narrows the region by all rules before it that are not asked.
    pub(crate) fn first_for_flow<'a>(
        &'a self,
        applies: &Applies,
        flow: &FlowSubject,
        region: &mut Region,
        mut matches: impl FnMut(&'a Rule, &mut Region) -> bool,
    ) -> Option<&'a Rule> {
        let mut found = None;
        for index in merged(self.candidates(flow), &self.others) {
            let Some(rule) = self.rules.get(index as usize) else {
                continue;
            };
            if applies.has(index) && !rule.lookup_only && matches(rule, region) {
                found = Some((index, rule.as_ref()));
                break;
            }
        }
        let end = found.map_or(u32::MAX, |(index, _)| index);
        self.keep_clear(applies, flow, region, end);
        found.map(|(_, rule)| rule)
    }

    /// The first rule of those that apply that decides a lookup of a name. Narrows the region.
    pub(crate) fn first_for_lookup(
        &self,
        applies: &Applies,
        name: &Name,
        region: &mut LookupMatch,
    ) -> Option<&Rule> {
        let mut candidates = Vec::new();
        self.lookups.candidates(name, &mut candidates);
        let found = candidates.into_iter().filter(|index| applies.has(*index)).min();
        let rule = found.and_then(|index| self.rules.get(index as usize));
        let end = found.unwrap_or(u32::MAX);
        let within = std::mem::replace(region, LookupMatch::Any);
        *region = self.lookups.narrow(within, name, end);
        if let Some(names) = rule.and_then(|rule| rule.test.names.as_ref()) {
            let within = std::mem::replace(region, LookupMatch::Any);
            *region = names.narrow(within, name);
        }
        rule.map(AsRef::as_ref)
    }

    /// The rules that a prefix or a name of the flow finds, in order.
    fn candidates(&self, flow: &FlowSubject) -> Vec<u32> {
        let peer = flow.key.peer.ip();
        let mut found = Vec::new();
        let mut add = |address: IpAddr| {
            for (index, _) in self.prefixes.holding(address) {
                found.extend(self.having.get(index).into_iter().flatten());
            }
        };
        add(peer);
        // What a test looks at: an address that carries one of IPv4 stands for that one.
        let dialled = judged(flow.dialled);
        if dialled != peer {
            add(dialled);
        }
        for name in &flow.names {
            self.names.candidates(name, &mut found);
            // No prefix is held against an address that is not known yet.
            if flow.guards.contains(Guard::Synthetic) {
                self.lookups.candidates(name, &mut found);
            }
        }
        found.sort_unstable();
        found.dedup();
        found
    }

    /// Narrows the region to where no rule before `end` matches that is not found by the flow.
    fn keep_clear(&self, applies: &Applies, flow: &FlowSubject, region: &mut Region, end: u32) {
        let (address, port) = (flow.key.peer.ip(), flow.key.peer.port());
        let here = |protocols: ProtocolSet| protocols.contains(flow.key.protocol);
        for shape in self.shapes.iter().filter(|s| s.first < end && here(s.protocols)) {
            if shape.ports.is_empty() || shape.ports.range_of(port).is_some() {
                region.consult_names(address);
            } else {
                region.exclude_ports(&shape.ports, port);
            }
        }
        let (before, after) = self.prefixes.beside(address);
        self.keep_clear_on(applies, flow, region, end, before);
        self.keep_clear_on(applies, flow, region, end, after);
    }

    /// On one side of the flow's address, from the nearest prefix on.
    fn keep_clear_on(
        &self,
        applies: &Applies,
        flow: &FlowSubject,
        region: &mut Region,
        end: u32,
        side: impl Iterator<Item = (usize, ipnet::IpNet)>,
    ) {
        let (address, port) = (flow.key.peer.ip(), flow.key.peer.port());
        let mut looked_at = 0;
        for (index, prefix) in side {
            looked_at += 1;
            if prefix.contains(&address) {
                continue;
            }
            if !region.touches(prefix) {
                return;
            }
            for rule_index in self.having.get(index).into_iter().flatten() {
                looked_at += 1;
                let Some(rule) = self.rules.get(*rule_index as usize) else {
                    continue;
                };
                if looked_at > NEIGHBOURS_MAX {
                    region.exclude(address, prefix);
                    return;
                }
                match concerns(&rule.test, flow, region, port) {
                    _ if *rule_index >= end || !applies.has(*rule_index) => {}
                    Concern::None => {}
                    Concern::OtherPorts => region.exclude_ports(&rule.test.ports, port),
                    // What lies further off shares fewer bits with the address.
                    Concern::Same => {
                        region.exclude(address, prefix);
                        return;
                    }
                }
            }
            if looked_at > NEIGHBOURS_MAX {
                region.exclude(address, prefix);
                return;
            }
        }
    }
}

/// What a rule whose prefix lies beside a flow has to do with the flow's region.
enum Concern {
    /// Another protocol, or ports that the region does not have.
    None,
    /// Ports of the region, but not that of the flow.
    OtherPorts,
    /// The flow's own protocol and port.
    Same,
}

fn concerns(test: &FlowTest, flow: &FlowSubject, region: &Region, port: u16) -> Concern {
    if !test.protocols.contains(flow.key.protocol) {
        return Concern::None;
    }
    if test.ports.is_empty() || test.ports.range_of(port).is_some() {
        return Concern::Same;
    }
    if test.ports.meets(region.ports()) {
        Concern::OtherPorts
    } else {
        Concern::None
    }
}

/// Two ascending sequences as one.
fn merged<'a>(found: Vec<u32>, others: &'a [u32]) -> impl Iterator<Item = u32> + 'a {
    let mut found = found.into_iter().peekable();
    let mut others = others.iter().copied().peekable();
    std::iter::from_fn(move || match (found.peek(), others.peek()) {
        (Some(a), Some(b)) if a <= b => found.next(),
        (Some(_), None) => found.next(),
        (_, Some(_)) => others.next(),
        (None, None) => None,
    })
}

/// Which rules have a pattern that covers a name.
#[derive(Debug, Default)]
struct NameIndex {
    exact: HashMap<Box<str>, Vec<u32>>,
    below: HashMap<Box<str>, Vec<u32>>,
    /// For each proper ancestor of an entered name, the first rule that has one below it.
    mixed: HashMap<Box<str>, u32>,
    /// Large tables, with the rules that have them, in order.
    tables: Vec<(Arc<NameTable>, Vec<u32>)>,
    /// Regular expressions, with the rules that have them, in order.
    expressions: Vec<(Arc<NamePatterns>, u32)>,
    /// The first rule of all.
    first: Option<u32>,
}

impl NameIndex {
    /// Enters a rule; those before it are entered already.
    fn add(&mut self, rule: u32, names: &NameSet) {
        self.first.get_or_insert(rule);
        if let Some(expressions) = names.expressions() {
            self.expressions.push((Arc::clone(expressions), rule));
        }
        for table in names.tables() {
            if table.len() > ENTERED_MAX {
                match self
                    .tables
                    .iter_mut()
                    .find(|(other, _)| Arc::ptr_eq(other, table))
                {
                    Some((_, rules)) => rules.push(rule),
                    None => self.tables.push((Arc::clone(table), vec![rule])),
                }
                continue;
            }
            for pattern in table.patterns() {
                let name = pattern.name();
                let map = match &pattern {
                    NamePattern::Exact(_) => &mut self.exact,
                    NamePattern::Subdomains(_) => &mut self.below,
                };
                map.entry(name.as_str().into()).or_default().push(rule);
                for ancestor in name.ancestors().skip(1) {
                    self.mixed.entry(ancestor.into()).or_insert(rule);
                }
            }
        }
    }

    fn candidates(&self, name: &Name, found: &mut Vec<u32>) {
        found.extend(self.exact.get(name.as_str()).into_iter().flatten());
        for ancestor in name.ancestors().skip(1) {
            found.extend(self.below.get(ancestor).into_iter().flatten());
        }
        for (table, rules) in &self.tables {
            if table.contains(name) {
                found.extend(rules);
            }
        }
        for (expressions, rule) in &self.expressions {
            if expressions.contains(name) {
                found.push(*rule);
            }
        }
    }

    /// The widest region around `name`, no wider than `within`, in which no rule before `end` has a
    /// pattern, given that none of them covers `name`.
    fn narrow(&self, within: LookupMatch, name: &Name, end: u32) -> LookupMatch {
        if self.first.is_none_or(|first| first >= end) {
            return within;
        }
        if self.expressions.first().is_some_and(|(_, first)| *first < end) {
            return LookupMatch::Exact(name.clone());
        }
        let tables = self
            .tables
            .iter()
            .filter(|(_, rules)| rules.first().is_some_and(|first| *first < end));
        let tables: Vec<&NameTable> = tables.map(|(table, _)| table.as_ref()).collect();
        let clear = clear_around(name, |ancestor| {
            self.mixed.get(ancestor).is_some_and(|first| *first < end)
                || tables.iter().any(|table| table.is_mixed(ancestor))
        });
        narrower(within, clear)
    }
}
