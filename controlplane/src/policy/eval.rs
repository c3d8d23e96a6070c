//! The decision: one pure function for flows and one for lookups, in the design's order.
//!
//! First answer wins. For a flow: modes `block` and `quarantine` (of the VM, and of the other guest that
//! the flow is for), grants that deny, rules in order, grants that allow, a rule that asks, guards,
//! `dns.allowedDomains`, the default action. For a lookup (an alias in an answer: `alias.rs`):
//! `block`, `dns.blockedDomains`, grants that deny, rules with `domains`, grants that allow, a rule that
//! asks, `dns.allowedDomains`, the lookups' default. Addresses where a vnet daemon listens come before
//! all of it: nothing opens them.

use std::time::SystemTime;

use ipnet::IpNet;
use vnet_proto::model::special::judged;
use vnet_proto::model::{
    Budget, FlowMatch, FlowSubject, Guard, GuardSet, LookupMatch, LookupSubject, Mode, Name, NameDemand,
    PortRange, Reason, Subject, Target,
};

use crate::grant::{Grant, GrantId, ReadyGrant, VmGrants, VmView};
use crate::policy::alias::decide_alias;
use crate::policy::answer::{Answer, default_answer, guarded, guarded_dns};
use crate::policy::forwards::forward_overruled_by;
use crate::policy::guard::{is_inside_private, private_ranges};
use crate::policy::region::{Region, Sides};
use crate::policy::synthetic;
use crate::policy::{DefaultAction, Effective, FlowTest, GuardedRanges, NameSet, Rule, RuleAction};

/// What a decision reads beside its subject.
#[derive(Debug, Clone, Copy)]
pub struct Context<'a> {
    /// The VM.
    pub vm: &'a VmView,
    /// What it is under.
    pub policy: &'a Effective,
    /// The grants that reach it, all in force.
    pub grants: &'a VmGrants,
    /// What its dataplane guards.
    pub guarded: &'a GuardedRanges,
    /// For a flow to another guest: that one, if it is known.
    pub peer: Option<PeerView<'a>>,
}

/// The other guest that a flow is for, as far as it has a say.
#[derive(Debug, Clone, Copy)]
pub struct PeerView<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its mode in force; `None`: it is open, under neither policy nor mode.
    pub mode: Option<Mode>,
}

/// What comes of a flow or lookup.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// It goes through.
    Allow,
    /// It is refused, and the guest is told.
    Deny,
    /// It is refused in silence.
    Drop,
    /// A person is asked.
    Ask,
}

/// An answer, with what it rests on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision<M> {
    /// What is done.
    pub outcome: Outcome,
    /// The step, subject and sentence behind it.
    pub reason: Reason,
    /// Where the same outcome holds. For [`Outcome::Ask`], and under a grant for once, the subject alone.
    pub found: M,
    /// Observe mode let through what would have been denied.
    pub would_deny: bool,
    /// The grant that it rests on.
    pub grant: Option<GrantId>,
    /// It is for this one subject only and never cached: the grant is for once.
    pub once: bool,
    /// What is left of the grant's budget.
    pub budget: Option<Budget>,
    /// When the grant or the rule ends by time.
    pub expires_at: Option<SystemTime>,
    /// What the flow must say of the name that the answer rests on.
    pub name_demand: NameDemand,
    /// The names that it may say.
    pub names: Vec<Name>,
    /// For a lookup that is allowed: it is answered with a synthetic address, and nothing goes upstream.
    pub synthetic_only: bool,
    /// What would change the answer, in one sentence; empty where nothing would.
    pub remedy: String,
}

impl FlowDecision {
    /// Whether a flow that is let through by this may be one that opened with these names to choose from; empty
    /// where no name was demanded of it. Which of them was spoken is not known, so all of them have to be allowed.
    pub fn may_go_on(&self, names: &[Name]) -> bool {
        let demands = self.name_demand != NameDemand::Off;
        !demands || (!names.is_empty() && names.iter().all(|name| self.names.contains(name)))
    }
}

/// An answer about a flow.
pub type FlowDecision = Decision<FlowMatch>;

/// An answer about a lookup.
pub type LookupDecision = Decision<LookupMatch>;

/// Decides a flow.
pub fn decide_flow(context: &Context<'_>, flow: &FlowSubject) -> FlowDecision {
    let decision = if synthetic::is_synthetic(flow) {
        synthetic::decide(context, flow)
    } else {
        decide_plain(context, flow)
    };
    as_observed(context, decision)
}

/// Decides a flow that lives: whether it may live on. [`Decision::may_go_on`] says whether that is so whatever
/// name was spoken on it.
pub fn decide_live(context: &Context<'_>, flow: &FlowSubject) -> FlowDecision {
    let decision = if synthetic::is_synthetic(flow) {
        synthetic::decide_live(context, flow)
    } else {
        decide_plain(context, flow)
    };
    as_observed(context, decision)
}

/// In mode `observe` a name that disagrees leaves the flow to the default action, which that mode lets through.
fn as_observed(context: &Context<'_>, decision: FlowDecision) -> FlowDecision {
    if context.policy.mode() != Some(Mode::Observe) {
        return decision;
    }
    FlowDecision {
        name_demand: NameDemand::Off,
        names: Vec::new(),
        ..decision
    }
}

fn decide_plain(context: &Context<'_>, flow: &FlowSubject) -> FlowDecision {
    let mut region = Region::around(flow, context.guarded);
    let answer = flow_answer(context, flow, &mut region);
    let alone = answer.outcome == Outcome::Ask || answer.once();
    let names_consulted = region.names_consulted();
    let mut found = region.into_match(flow.key.protocol);
    if alone {
        found = FlowMatch {
            names_consulted,
            ..FlowMatch::exact(&flow.key)
        };
    }
    with_other_names(context, flow, answer.into_decision(found))
}

/// An address that serves several names which are allowed, each by a rule or grant of its own, may be spoken to by
/// any of them: to the names that an answer rests on are added those that would be let through alone. What holds
/// for one flow only, or is counted, is not lent to another name. The answer ends with the first of what it rests on.
/// Where a grant opens the address by itself, and each of the names would be let through, none is demanded.
fn with_other_names(context: &Context<'_>, flow: &FlowSubject, mut decision: FlowDecision) -> FlowDecision {
    let lends = decision.outcome == Outcome::Allow && !decision.once && decision.budget.is_none();
    if !lends || decision.name_demand == NameDemand::Off {
        return decision;
    }
    let with_names = |names: Vec<Name>| {
        let flow = FlowSubject {
            names,
            ..flow.clone()
        };
        let mut region = Region::around(&flow, context.guarded);
        flow_answer(context, &flow, &mut region)
    };
    let lends = |answer: &Answer| {
        let budget = answer.grant.as_ref().and_then(|grant| grant.budget_left());
        answer.outcome == Outcome::Allow && !answer.once() && budget.is_none()
    };
    let others: Vec<&Name> = flow
        .names
        .iter()
        .filter(|name| !decision.names.contains(name))
        .collect();
    let mut grants = context.grants.allow.iter();
    let has_address_grants = grants.any(|ready| ready.flows && ready.test.names.is_none());
    if !others.is_empty() || has_address_grants {
        // At another port others may be allowed, or none be demanded.
        decision.found.ports = PortRange::one(flow.key.peer.port());
    }
    let mut all_pass = true;
    for name in others {
        let answer = with_names(vec![name.clone()]);
        all_pass &= answer.outcome == Outcome::Allow;
        if !lends(&answer) || answer.name_demand == NameDemand::Off {
            continue;
        }
        let ends = answer.into_decision(()).expires_at;
        decision.expires_at = decision.expires_at.into_iter().chain(ends).min();
        decision.names.push(name.clone());
    }
    if has_address_grants && all_pass {
        let answer = with_names(Vec::new());
        if lends(&answer) && answer.name_demand == NameDemand::Off && answer.grant.is_some() {
            return answer.into_decision(decision.found);
        }
    }
    decision
}

/// Decides a lookup, or an alias in the answer to one.
pub fn decide_lookup(context: &Context<'_>, lookup: &LookupSubject) -> LookupDecision {
    if lookup.alias {
        return decide_alias(context, &lookup.name);
    }
    let mut region = LookupMatch::Any;
    let mut answer = lookup_answer(context, &lookup.name, &mut region);
    let asked = answer.outcome == Outcome::Ask;
    if asked && context.policy.synthetic_answers() {
        // The connection is what is asked about.
        answer = Answer::new(
            Outcome::Allow,
            "dns",
            "dns.answer".to_owned(),
            format!(
                "{} gets a synthetic address; nothing is looked up before a connection is allowed",
                lookup.name
            ),
            answer.remedy,
        );
    }
    let synthetic_only = asked && answer.outcome == Outcome::Allow;
    let alone = answer.outcome == Outcome::Ask || answer.once();
    let found = if alone || synthetic_only {
        LookupMatch::Exact(lookup.name.clone())
    } else {
        region
    };
    LookupDecision {
        synthetic_only,
        ..answer.into_decision(found)
    }
}

/// The rule that makes a grant without effect for a VM, if one does: it refuses all that the grant
/// would allow, before anything lets it through. A grant that denies is never overruled.
pub fn overruled_by(context: &Context<'_>, grant: &Grant) -> Option<String> {
    if grant.action == crate::grant::GrantAction::Deny {
        return None;
    }
    if let Target::Forward(forward) = &grant.target {
        return forward_overruled_by(context, forward);
    }
    let ready = ReadyGrant::new(std::sync::Arc::new(grant.clone()));
    let pattern = match &grant.target {
        Target::Name { pattern, .. } => Some(pattern),
        Target::Address { .. } | Target::Forward(_) => None,
    };
    if pattern.is_some_and(|pattern| context.policy.blocked.covers(pattern)) {
        return Some("dns.blockedDomains".to_owned());
    }
    let covers = |rule: &Rule| {
        let names = match (&rule.test.names, pattern) {
            (None, _) => true,
            (Some(names), Some(pattern)) => names.covers(pattern),
            (Some(_), None) => false,
        };
        let flows = ready.flows && !rule.lookup_only && rule.test.covers_but_for_names(&ready.test);
        let lookups = pattern.is_some() && rule.is_for_lookups() && rule.action.refuses();
        names && (flows || lookups)
    };
    let first = context.policy.rules().find(|rule| covers(rule))?;
    first.action.refuses().then(|| first.label.clone())
}

/// Whether a grant that allows matches a flow or lookup, and names every guard that a flow is under: it would
/// let through what nothing before it decides.
pub(crate) fn would_let_through(context: &Context<'_>, ready: &ReadyGrant, subject: &Subject) -> bool {
    match subject {
        Subject::Flow(flow) => {
            let guards = guards_in_force(context, flow);
            let mut region = Region::around(flow, context.guarded);
            ready.flows && opens(context, &ready.test, flow, guards, &mut region)
        }
        Subject::Lookup(lookup) => {
            let names = ready.test.names.as_ref();
            ready.lookups && names.is_some_and(|names| names.contains(&lookup.name))
        }
    }
}

pub(super) fn flow_answer(context: &Context<'_>, flow: &FlowSubject, region: &mut Region) -> Answer {
    let policy = context.policy;
    let target = Target::of_subject(flow);
    if flow.guards.contains(Guard::Daemon) {
        let text = "a vnet daemon listens there, which is closed to every guest".to_owned();
        return Answer::new(
            Outcome::Deny,
            "guard",
            Guard::Daemon.to_string(),
            text,
            String::new(),
        );
    }
    if let Some(answer) = blocked_by_mode(context).or_else(|| closed_by_peer(context, flow)) {
        return answer;
    }

    let denying = context.grants.deny.iter().filter(|g| g.flows);
    for ready in denying {
        if region.test(&ready.test, flow, Sides::Either) {
            return Answer::of_grant(Outcome::Deny, &ready.grant);
        }
    }

    let guards = guards_in_force(context, flow);
    let mut asking: Option<&Rule> = None;
    let matches = |rule: &Rule, region: &mut Region| match rule.action {
        RuleAction::Deny | RuleAction::Drop => region.test(&rule.test, flow, Sides::Either),
        RuleAction::Allow | RuleAction::Ask => opens(context, &rule.test, flow, guards, region),
    };
    let first = policy
        .rules
        .iter()
        .find_map(|(list, applies)| list.first_for_flow(applies, flow, region, matches));
    if let Some(rule) = first {
        match rule.action {
            RuleAction::Allow => {
                return Answer::of_rule(context, Outcome::Allow, rule).resting_on(
                    &rule.test,
                    rule.name_demand(),
                    flow,
                );
            }
            RuleAction::Deny => return Answer::of_rule(context, Outcome::Deny, rule),
            RuleAction::Drop => return Answer::of_rule(context, Outcome::Drop, rule),
            RuleAction::Ask => asking = Some(rule),
        }
    }

    let allowing = context.grants.allow.iter().filter(|g| g.flows);
    for ready in allowing {
        if opens(context, &ready.test, flow, guards, region) {
            let answer = Answer::of_grant(Outcome::Allow, &ready.grant);
            // What a rule that asks about a name demands of it is demanded of the answer's flows, too.
            let demand = asking
                .filter(|rule| rule.test.names.is_some())
                .map_or(NameDemand::ByPort, Rule::name_demand);
            return Answer {
                until: asking.and_then(|rule| rule.until),
                ..answer.resting_on(&ready.test, demand, flow)
            };
        }
    }

    if let Some(rule) = asking {
        return Answer::asked_by_rule(context, rule, &target);
    }

    if let Some(guard) = guards.iter().next() {
        // A name that comes or goes changes this guard.
        if guards.contains(Guard::PrivateFromDns) {
            region.consult_names(flow.key.peer.ip());
        }
        return guarded(context, flow, guard);
    }
    if let Some(resolvers) = &policy.resolvers
        && let Some(way) = resolvers.way(flow, region)
    {
        let text = format!("it is {way}, which guards.dns closes but for a rule or grant that names it");
        return guarded_dns(context, text, &Target::of_flow(&flow.key));
    }

    let ported = flow.key.protocol.has_ports();
    if ported && !policy.allowed.is_empty() {
        region.consult_names(flow.key.peer.ip());
        let allowed = |name: &&Name| policy.allowed.contains(name) && !policy.blocked.contains(name);
        let names: Vec<Name> = flow.names.iter().filter(allowed).cloned().collect();
        if let Some(name) = names.first() {
            let subject = "dns.allowedDomains".to_owned();
            let text = format!(
                "{} is bound to {name}, which dns.allowedDomains has",
                flow.key.peer.ip()
            );
            let answer = Answer::new(Outcome::Allow, "dns", subject, text, String::new());
            return Answer {
                name_demand: NameDemand::ByPort,
                names,
                ..answer
            };
        }
    }

    let answer = default_answer(context, policy.default_action(), &target);
    // Beside this flow there may be addresses that a guard would have stopped one step before.
    if answer.outcome == Outcome::Allow {
        consult_private(context, flow, region);
    }
    answer
}

/// Whether a name is in a set. Narrows the region by what was read.
fn is_in(names: &NameSet, name: &Name, region: &mut LookupMatch) -> bool {
    *region = names.narrow(std::mem::replace(region, LookupMatch::Any), name);
    names.contains(name)
}

/// What refuses a name before any rule is read: the mode, `dns.blockedDomains`, a grant.
pub(super) fn refused_at_once(
    context: &Context<'_>,
    name: &Name,
    region: &mut LookupMatch,
) -> Option<Answer> {
    let policy = context.policy;
    if let Some(answer) = blocked_by_mode(context) {
        return Some(answer);
    }
    if is_in(&policy.blocked, name, region) {
        let text = format!("dns.blockedDomains has {name}");
        let remedy = format!(
            "take it from dns.blockedDomains of policy {}",
            policy.policy_name()
        );
        return Some(Answer::new(
            Outcome::Deny,
            "dns",
            "dns.blockedDomains".to_owned(),
            text,
            remedy,
        ));
    }
    let denying = context.grants.deny.iter().filter(|g| g.lookups);
    for ready in denying {
        let names = ready.test.names.as_ref();
        if names.is_some_and(|names| is_in(names, name, region)) {
            return Some(Answer::of_grant(Outcome::Deny, &ready.grant));
        }
    }
    None
}

/// The first rule that decides the lookup of a name, the guard of DNS aside.
pub(super) fn first_rule_for_lookup<'a>(
    context: &Context<'a>,
    name: &Name,
    region: &mut LookupMatch,
) -> Option<&'a Rule> {
    let mut lists = context.policy.rules.iter();
    lists.find_map(|(list, applies)| list.first_for_lookup(applies, name, region))
}

pub(super) fn lookup_answer(context: &Context<'_>, name: &Name, region: &mut LookupMatch) -> Answer {
    let policy = context.policy;
    if let Some(answer) = refused_at_once(context, name, region) {
        return answer;
    }
    let test = |names: &NameSet, region: &mut LookupMatch| is_in(names, name, region);

    let mut asking: Option<&Rule> = None;
    let mut first = first_rule_for_lookup(context, name, region);
    // A name of another DNS server is opened by what names it, and by no pattern.
    let is_resolver = |region: &mut LookupMatch| {
        let resolvers = policy.resolvers.as_ref();
        let found = resolvers.is_some_and(|resolvers| test(resolvers.names(), region));
        if found {
            *region = LookupMatch::Exact(name.clone());
        }
        found
    };
    if first.is_some_and(|rule| !rule.action.refuses()) && is_resolver(region) {
        first = policy.rules().map(AsRef::as_ref).find(|rule| {
            let names = rule.test.names.as_ref().filter(|_| rule.is_for_lookups());
            names
                .is_some_and(|names| names.contains(name) && (rule.action.refuses() || names.has_exact(name)))
        });
    }
    if let Some(rule) = first {
        match rule.action {
            RuleAction::Allow => return Answer::of_rule(context, Outcome::Allow, rule),
            RuleAction::Deny => return Answer::of_rule(context, Outcome::Deny, rule),
            RuleAction::Drop => return Answer::of_rule(context, Outcome::Drop, rule),
            RuleAction::Ask => asking = Some(rule),
        }
    }

    for ready in context.grants.allow.iter().filter(|g| g.lookups) {
        let names = ready.test.names.as_ref().filter(|names| test(names, region));
        if names.is_some_and(|names| !is_resolver(region) || names.has_exact(name)) {
            return Answer {
                until: asking.and_then(|rule| rule.until),
                ..Answer::of_grant(Outcome::Allow, &ready.grant)
            };
        }
    }

    let target = Target::of_name(name.clone());
    if let Some(rule) = asking {
        return Answer::asked_by_rule(context, rule, &target);
    }

    let open = policy.lookup_default() == DefaultAction::Allow || policy.mode() != Some(Mode::Enforce);
    let allowed = test(&policy.allowed, region);
    if (allowed || open) && !policy.allowed.has_exact(name) && is_resolver(region) {
        return guarded_name(context, name);
    }
    if allowed {
        let text = "dns.allowedDomains has the name".to_owned();
        return Answer::new(
            Outcome::Allow,
            "dns",
            "dns.allowedDomains".to_owned(),
            text,
            String::new(),
        );
    }

    default_answer(context, policy.lookup_default(), &target)
}

/// The guard of DNS on the name of another server.
pub(super) fn guarded_name(context: &Context<'_>, name: &Name) -> Answer {
    let text = format!(
        "{name} is the name of a DNS server, which guards.dns closes but for a rule or grant that names it"
    );
    guarded_dns(context, text, &Target::of_name(name.clone()))
}

fn blocked_by_mode(context: &Context<'_>) -> Option<Answer> {
    let mode = context
        .policy
        .mode()
        .filter(|mode| matches!(mode, Mode::Block | Mode::Quarantine))?;
    let text = format!("mode {mode} denies everything that {} initiates", context.vm.name);
    let (text, remedy) = match context.policy.unsettled() {
        Some(why) => (why.text(&text), why.remedy.clone()),
        None => (text, format!("vnetctl vm mode {} enforce", context.vm.name)),
    };
    Some(Answer::new(Outcome::Deny, "mode", mode.to_string(), text, remedy))
}

/// A guest in mode `block` or `quarantine` is closed to the others, too.
fn closed_by_peer(context: &Context<'_>, flow: &FlowSubject) -> Option<Answer> {
    let peer = context.peer.filter(|_| flow.guards.contains(Guard::Guest))?;
    let mode = peer
        .mode
        .filter(|mode| matches!(mode, Mode::Block | Mode::Quarantine))?;
    let text = format!("mode {mode} of {} closes it to other guests", peer.name);
    let remedy = format!("vnetctl vm mode {} enforce", peer.name);
    Some(Answer::new(Outcome::Deny, "mode", mode.to_string(), text, remedy))
}

/// The guards that a flow is under and that apply: all of them, but for a VM under neither policy nor
/// mode only those of metadata and of guests that are not as open themselves.
fn guards_in_force(context: &Context<'_>, flow: &FlowSubject) -> GuardSet {
    let in_force = |guard: &Guard| match guard {
        Guard::Guest => {
            let peer_open = context.peer.is_some_and(|peer| peer.mode.is_none());
            !(context.policy.is_open() && peer_open)
        }
        Guard::Metadata | Guard::Daemon => true,
        // No prefix matches it in the first place.
        Guard::Synthetic => false,
        Guard::Host | Guard::PrivateFromDns => !context.policy.is_open(),
    };
    let in_force = |guard: &Guard| in_force(guard) && context.policy.keeps(*guard);
    flow.guards.iter().filter(in_force).collect()
}

/// Whether something that allows or asks matches a flow: its test does, and it names every guard that
/// the flow is under, that of other DNS servers included. Narrows the region by what was read.
fn opens(
    context: &Context<'_>,
    test: &FlowTest,
    flow: &FlowSubject,
    guards: GuardSet,
    region: &mut Region,
) -> bool {
    opens_but_for_dns(context, test, flow, guards, region)
        && context.policy.resolvers.as_ref().is_none_or(|resolvers| {
            resolvers
                .way(flow, region)
                .is_none_or(|way| resolvers.is_named(way, test, flow, region))
        })
}

fn opens_but_for_dns(
    context: &Context<'_>,
    test: &FlowTest,
    flow: &FlowSubject,
    guards: GuardSet,
    region: &mut Region,
) -> bool {
    let (peer, dialled) = (flow.key.peer.ip(), judged(flow.dialled));
    if guards.is_empty() && dialled != peer {
        // Dialled at another address: where that leads is what is judged, unless this very one is named. The
        // region is the flow alone.
        let prefixes = &test.prefixes;
        let names = prefixes.is_empty()
            || prefixes.contains(dialled)
            || prefixes.holding(peer).any(|prefix| prefix == IpNet::from(peer));
        return region.test(test, flow, Sides::Either) && names;
    }
    if guards.is_empty() {
        if !region.test(test, flow, Sides::Visible) {
            return false;
        }
        // Beside this flow there may be private addresses that DNS taught: a prefix inside a private
        // range names those too, a broader one does not.
        let private = test.prefixes.holding(peer).find(|p| is_inside_private(*p));
        match private {
            Some(prefix) => region.limit(prefix),
            None => consult_private(context, flow, region),
        }
        return true;
    }
    if guards.contains(Guard::PrivateFromDns) {
        region.consult_names(peer);
    }
    let holding = test.prefixes.holding(peer).chain(test.prefixes.holding(dialled));
    let mut naming = holding.filter(|prefix| context.guarded.names_all(guards, *prefix, peer, dialled));
    let names_guards = naming.next().is_some();
    region.test(test, flow, Sides::Either) && names_guards
}

/// The answer depends on whether DNS taught the address, if it is private: a private address stands
/// for itself until its names change, any other region keeps clear of private ranges.
fn consult_private(context: &Context<'_>, flow: &FlowSubject, region: &mut Region) {
    if context.policy.is_open() {
        return;
    }
    let address = flow.key.peer.ip();
    if is_inside_private(address.into()) {
        region.consult_names(address);
    } else {
        for range in private_ranges() {
            region.exclude(address, *range);
        }
    }
}
