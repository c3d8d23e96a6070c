//! What a reader of a policy should know of it although it loads: rules that earlier ones leave
//! nothing to, ways out that are easily overlooked.

mod nowhere;
mod opened;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use ipnet::IpNet;
use vnet_proto::model::{Guard, Mode, NamePattern, PortRange, Protocol, VmSelector};

use crate::clock::Now;
use crate::policy::guard::GuardedRanges;
use crate::policy::lint::nowhere::of_prefixes;
use crate::policy::lint::opened::{Guards, Opened};
use crate::policy::{
    DefaultAction, DnsGuard, FlowTest, GuardAction, NameSet, Policy, PolicyWarning, ProtocolSet, Rule,
    RuleAction, Settings,
};

/// Warnings of one document.
const WARNINGS_MAX: usize = 100;

/// Rules that are compared with each other; more would take longer than a load may.
const COMPARED_MAX: usize = 1_000;

/// Names and prefixes of a rule that are compared one by one with an earlier rule's.
const NAMES_COMPARED_MAX: usize = 1_000;
const PREFIXES_COMPARED_MAX: usize = 1_000;

/// Names of a list that are looked at for public suffixes.
const SUFFIXES_MAX: usize = 100_000;

/// All warnings, in order of position, after those that were found while it was read.
pub(crate) fn warnings(policy: &Policy) -> Vec<PolicyWarning> {
    let mut warnings = policy.warnings.clone();
    let closed = policy.default_action != Some(DefaultAction::Allow) || policy.mode == Some(Mode::Ask);
    let at_start = |text: &str| PolicyWarning {
        line: 1,
        column: 1,
        text: text.to_owned(),
    };

    if policy.leaves_lookups_open() && closed && policy.mode != Some(Mode::Ask) {
        warnings.push(at_start(
            "lookups stay open, since there is neither dns: nor version:, and DNS is an open channel: names \
             carry data out; add dns: with defaultAction: deny, or version: 1",
        ));
    }
    let lookups = policy.dns.as_ref().and_then(|dns| dns.default_action);
    if lookups == Some(DefaultAction::Allow) && closed {
        warnings.push(at_start(
            "dns.defaultAction: allow leaves lookups open while addresses are closed, and DNS is an open \
             channel: names carry data out",
        ));
    }
    if policy.mode == Some(Mode::Ask) && policy.default_action == Some(DefaultAction::Allow) {
        warnings.push(at_start(
            "defaultAction: allow has no effect in mode ask, which asks all the same",
        ));
    }
    if let Some(dns) = &policy.dns {
        let refused = dns.allowed.patterns().take(SUFFIXES_MAX);
        for pattern in refused
            .filter(|pattern| dns.blocked.covers(pattern))
            .take(WARNINGS_MAX)
        {
            warnings.push(at_start(&format!(
                "dns.allowedDomains has {pattern}, which dns.blockedDomains refuses all the same"
            )));
        }
        for pattern in suffixes(&dns.allowed).take(WARNINGS_MAX) {
            warnings.push(at_start(&format!(
                "dns.allowedDomains has {pattern}, and {}",
                of_suffix(&pattern)
            )));
        }
    }

    warnings.extend(of_guards(policy).into_iter().map(at_start));
    warnings.extend(of_profiles(policy));

    let rules = policy.rules.as_slice();
    let guards = Guards::of(policy);
    warnings.extend(denied_name(policy, closed));
    for (index, rule) in rules.iter().enumerate() {
        let mut texts = of_rule(rule, &policy.settings);
        if index < COMPARED_MAX {
            let earlier = rules.iter().take(index).rev();
            let opened = Opened::new(rule, &guards);
            texts.extend(
                earlier
                    .filter_map(|earlier| shadow(earlier, rule, &opened))
                    .next(),
            );
        }
        warnings.extend(texts.into_iter().map(|text| PolicyWarning {
            line: rule.line,
            column: rule.column,
            text,
        }));
        if warnings.len() >= WARNINGS_MAX {
            break;
        }
    }
    warnings.truncate(WARNINGS_MAX);
    warnings.sort_by_key(|warning| (warning.line, warning.column));
    warnings
}

impl Policy {
    /// Rules whose time is over, which is a matter of when it is asked: [`Policy::warnings`] does not have it.
    pub fn over_by(&self, now: Now) -> Vec<PolicyWarning> {
        let over = self.rules.as_slice().iter().filter(|rule| rule.is_over(now));
        let warning = |rule: &Arc<Rule>| PolicyWarning {
            line: rule.line,
            column: rule.column,
            text: format!("{} can never match: its until is in the past", rule.label),
        };
        over.take(WARNINGS_MAX).map(warning).collect()
    }
}

/// Guards that are taken away.
fn of_guards(policy: &Policy) -> Vec<&'static str> {
    let profiles = policy.profiles.iter().map(|profile| &profile.settings);
    let all: Vec<&Settings> = std::iter::once(&policy.settings).chain(profiles).collect();
    let mut texts = Vec::new();
    if all.iter().any(|said| said.metadata == Some(GuardAction::Off)) {
        texts.push(
            "guards.metadata: off lets every broad rule open cloud metadata, which gives out the host's own \
             credentials; a rule whose cidr is the one address opens no more than is meant",
        );
    }
    if all.iter().any(|said| said.dns_guard == Some(DnsGuard::Off)) {
        texts.push(
            "guards.dns: off lets names be looked up past this policy, at any server that a broad rule reaches",
        );
    }
    texts
}

/// Profiles that an earlier one leaves no VM to, and rules that a redirect leaves nothing to.
fn of_profiles(policy: &Policy) -> Vec<PolicyWarning> {
    let mut warnings = Vec::new();
    let all = [
        Some(VmSelector::all()),
        VmSelector::new(Some("*".to_owned()), Default::default()),
    ];
    let everybody = |vms: &VmSelector| all.iter().flatten().any(|all| all == vms);
    for (index, profile) in policy.profiles.iter().enumerate() {
        let mut earlier = policy.profiles.iter().take(index);
        if let Some(earlier) = earlier.find(|earlier| earlier.vms == profile.vms || everybody(&earlier.vms)) {
            warnings.push(PolicyWarning {
                line: profile.line,
                column: profile.column,
                text: format!(
                    "{} is never for any VM: {} (line {}) is for all of its VMs, and the first that matches is \
                     the one",
                    profile.label, earlier.label, earlier.line
                ),
            });
        }
    }
    if policy.settings.dns_guard == Some(DnsGuard::Redirect) {
        let only_dns = |rule: &&Arc<Rule>| {
            let ports = rule.test.ports.ranges();
            matches!(ports, [one] if one.first() == 53 && one.last() == 53)
        };
        warnings.extend(policy.rules.as_slice().iter().filter(only_dns).map(|rule| PolicyWarning {
            line: rule.line,
            column: rule.column,
            text: format!(
                "{} is about port 53, which guards.dns: redirect has the gateway answer before any rule is read",
                rule.label
            ),
        }));
    }
    warnings
}

/// A name that is denied where the rest is open: told once, of the first.
fn denied_name(policy: &Policy, closed: bool) -> Option<PolicyWarning> {
    let rules = policy.rules.as_slice();
    let broad = |rule: &Arc<Rule>| {
        rule.action == RuleAction::Allow && rule.test.names.is_none() && everything(&rule.test).is_some()
    };
    if closed && !rules.iter().any(broad) {
        return None;
    }
    let denies = |rule: &&Arc<Rule>| rule.action.refuses() && rule.test.names.is_some();
    let blocks = policy.dns.as_ref().is_some_and(|dns| !dns.blocked.is_empty());
    let (line, column, what) = match rules.iter().find(denies) {
        Some(rule) => (rule.line, rule.column, rule.label.as_str()),
        None if blocks => (1, 1, "dns.blockedDomains"),
        None => return None,
    };
    Some(PolicyWarning {
        line,
        column,
        text: format!(
            "{what}: denying a name under a default that allows stops its lookups; whoever has the address from \
             elsewhere may still speak the name; deny by default and allow names instead"
        ),
    })
}

/// What is worth telling of one rule by itself.
fn of_rule(rule: &Rule, settings: &Settings) -> Vec<String> {
    let mut texts = of_prefixes(rule);
    let label = &rule.label;
    let test = &rule.test;
    if rule.action.refuses() {
        return texts;
    }
    if rule.action == RuleAction::Allow {
        let names = test.names.iter().flat_map(|names| suffixes(names));
        let named = |pattern| format!("{label}: {}", of_suffix(&pattern));
        texts.extend(names.take(WARNINGS_MAX).map(named));
    }
    if test.names.is_none()
        && test.ports.is_empty()
        && let Some(all) = everything(test)
    {
        let verb = match rule.action {
            RuleAction::Allow => "allows",
            _ => "asks for",
        };
        let closed = kept_guards(settings);
        texts.extend((!closed.is_empty()).then(|| {
            format!(
                "{label} {verb} {all}, but for guarded ones ({}): those need a rule that names them, as one does \
                 whose cidr lies inside of theirs",
                closed.join(", ")
            )
        }));
    } else {
        texts.extend(stopped_by_guards(rule, settings));
    }
    texts
}

/// Which whole of the address space a rule is for, if it is for one. A rule for some ports of everything is how
/// the web is opened, and says itself that it is not meant to open all there is.
fn everything(test: &FlowTest) -> Option<&'static str> {
    let whole = |address: IpAddr| match IpNet::new(address, 0) {
        Ok(whole) => test.prefixes.covers(whole),
        Err(_) => false,
    };
    let v4 = whole(Ipv4Addr::UNSPECIFIED.into());
    let v6 = whole(Ipv6Addr::UNSPECIFIED.into());
    match (test.prefixes.is_empty(), v4, v6) {
        (true, ..) | (false, true, true) => Some("every destination"),
        (false, true, false) => Some("every IPv4 destination"),
        (false, false, true) => Some("every IPv6 destination"),
        (false, false, false) => None,
    }
}

/// What the guards that a document leaves standing close.
fn kept_guards(settings: &Settings) -> Vec<&'static str> {
    let off = Some(GuardAction::Off);
    let said = [
        (settings.metadata != off, "metadata"),
        (settings.host != off, "the host"),
        (
            settings.private_from_dns != off,
            "private addresses that DNS taught",
        ),
        (settings.guests != off, "other guests"),
        (settings.dns_guard != Some(DnsGuard::Off), "other DNS servers"),
    ];
    let kept = said.into_iter().filter(|(kept, _)| *kept);
    kept.map(|(_, what)| what).collect()
}

/// A prefix that has guarded addresses without naming them: the rule stops short of those.
fn stopped_by_guards(rule: &Rule, settings: &Settings) -> Option<String> {
    let off = Some(GuardAction::Off);
    let kept = |guard: Guard| match guard {
        Guard::Metadata => settings.metadata != off,
        Guard::Host => settings.host != off,
        _ => true,
    };
    let guarded = GuardedRanges::new([], []);
    let stops = |prefix: IpNet| {
        let mut inside = guarded
            .iter_with_guards()
            .filter(|(guard, range)| kept(*guard) && prefix.contains(range) && prefix != *range);
        inside.next().map(|(_, range)| (prefix, range))
    };
    let mut prefixes = rule.test.prefixes.iter().take(PREFIXES_COMPARED_MAX);
    // Of a whole family it is the ports that say what is meant.
    let (prefix, range) =
        prefixes.find_map(|prefix| (prefix.prefix_len() > 0).then(|| stops(prefix)).flatten())?;
    Some(format!(
        "{}: {prefix} is broader than {range}, which stays guarded; add {range} itself to open that as well",
        rule.label
    ))
}

/// Patterns below which anyone may own a name, and names that are nobody's: `co.uk` for `*.co.uk`, or by mistake. A
/// suffix that a company has made of its own domain (`s3.amazonaws.com`) is a host as well, and by itself meant.
fn suffixes(names: &NameSet) -> impl Iterator<Item = NamePattern> {
    names.patterns().take(SUFFIXES_MAX).filter(|pattern| {
        let name = pattern.name().as_str();
        let Some(suffix) = psl::suffix(name.as_bytes()).filter(|suffix| *suffix == name) else {
            return false;
        };
        // Unlisted top-level names count as suffixes by the list's default rule; many are private.
        match pattern {
            NamePattern::Subdomains(_) => suffix.is_known(),
            NamePattern::Exact(_) => suffix.typ() == Some(psl::Type::Icann),
        }
    })
}

fn of_suffix(pattern: &NamePattern) -> String {
    let suffix = pattern.name();
    match pattern {
        NamePattern::Subdomains(_) => format!("{suffix} is a public suffix: anyone may own a name below it"),
        NamePattern::Exact(_) => {
            format!("{suffix} is a public suffix: it means that name alone, and none below it")
        }
    }
}

/// What is left of `rule` by `earlier`, if that is worth telling.
fn shadow(earlier: &Rule, rule: &Rule, opened: &Opened<'_>) -> Option<String> {
    if earlier.vms.is_some() && earlier.vms != rule.vms {
        return None;
    }
    // One that ends leaves the other all of it, some day.
    if earlier
        .until
        .is_some_and(|until| rule.until.is_none_or(|other| until < other))
    {
        return None;
    }
    let names_cover = match (&earlier.test.names, &rule.test.names) {
        (None, _) => true,
        (Some(_), None) => false,
        (Some(outer), Some(inner)) => names_cover(outer, inner),
    };
    if !names_cover || !prefixes_cover(&earlier.test, &rule.test) {
        return allowed_first(earlier, rule);
    }
    let place = format!("{} (line {})", earlier.label, earlier.line);
    let protocols = rule.test.protocols.and(earlier.test.protocols);
    if protocols.has_all(rule.test.protocols) && earlier.test.covers_ports(&rule.test) {
        // A lookup asks only the rules with names, and a guarded destination passes an allow or ask by that does
        // not name its guard.
        let lookups = rule.is_for_lookups() && earlier.test.names.is_none();
        let guarded = match (earlier.action.refuses(), rule.action.refuses()) {
            (true, _) => false,
            (false, true) => true,
            (false, false) if opened.is_all() && opened.beyond(earlier) => return None,
            (false, false) => opened.beyond(earlier),
        };
        let but = match (lookups, guarded) {
            (false, false) => "",
            (true, false) => " but lookups",
            (false, true) => " but guarded destinations",
            (true, true) => " but lookups and guarded destinations",
        };
        // What it does for those is what it is there for.
        if !but.is_empty() && rule.action == earlier.action {
            return None;
        }
        return Some(format!(
            "{} can never match{but}: {place} matches all of it before",
            rule.label
        ));
    }
    if rule.action == earlier.action || protocols.is_empty() {
        return None;
    }
    // A narrow rule before a broad one of another action is an exception, as meant; one that lets
    // through before a refusal of the same or fewer destinations takes a part of it.
    let opens_first = rule.action.refuses() && !earlier.action.refuses();
    let narrower = lies_strictly_inside(&rule.test, &earlier.test);
    let part = shared_part(&earlier.test, &rule.test, protocols)?;
    (opens_first && narrower).then(|| {
        let all: Vec<String> = rule.test.prefixes.iter().take(4).map(|p| p.to_string()).collect();
        format!(
            "{} does not {} {part} to {}: {place} {} that before; put {} first if it should",
            rule.label,
            rule.action,
            all.join(", "),
            does(earlier),
            rule.label,
        )
    })
}

/// An exception that comes too late for part of its destinations.
fn allowed_first(earlier: &Rule, rule: &Rule) -> Option<String> {
    let opens_first = rule.action.refuses() && !earlier.action.refuses() && earlier.test.names.is_none();
    let small = rule.test.prefixes.len() <= PREFIXES_COMPARED_MAX;
    if !opens_first || !small || rule.test.prefixes.is_empty() {
        return None;
    }
    let strictly = |inner: &IpNet| {
        earlier.test.prefixes.covers(*inner) && !earlier.test.prefixes.iter().any(|outer| outer == *inner)
    };
    let late: Vec<String> = rule
        .test
        .prefixes
        .iter()
        .filter(strictly)
        .take(4)
        .map(|p| p.to_string())
        .collect();
    if late.is_empty() {
        return None;
    }
    let protocols = rule.test.protocols.and(earlier.test.protocols);
    let part = shared_part(&earlier.test, &rule.test, protocols)?;
    Some(format!(
        "{} does not {} {part} to {}: {} (line {}) {} that before; put {} first if it should",
        rule.label,
        rule.action,
        late.join(", "),
        earlier.label,
        earlier.line,
        does(earlier),
        rule.label,
    ))
}

fn does(rule: &Rule) -> &'static str {
    match rule.action {
        RuleAction::Allow => "allows",
        RuleAction::Ask => "asks for",
        RuleAction::Deny | RuleAction::Drop => "refuses",
    }
}

/// Whether `outer` has every name of `inner`. Long lists are compared only with themselves.
fn names_cover(outer: &NameSet, inner: &NameSet) -> bool {
    let expressions = inner
        .expressions()
        .is_none_or(|own| outer.expressions().is_some_and(|other| Arc::ptr_eq(own, other)));
    expressions
        && inner.tables().iter().all(|table| {
            outer.tables().iter().any(|other| Arc::ptr_eq(other, table))
                || table.len() <= NAMES_COMPARED_MAX && table.patterns().all(|pattern| outer.covers(&pattern))
        })
}

fn prefixes_cover(outer: &FlowTest, inner: &FlowTest) -> bool {
    inner.prefixes.len() <= PREFIXES_COMPARED_MAX && outer.covers_prefixes(inner)
}

/// Whether the destinations of `inner` are a smaller part of those of `outer`: an exception that comes
/// too late. The other way round, or among equals, the earlier rule is the exception, as meant.
fn lies_strictly_inside(inner: &FlowTest, outer: &FlowTest) -> bool {
    let equal = |prefix: IpNet| outer.prefixes.iter().any(|other| other == prefix);
    !inner.prefixes.is_empty()
        && inner.prefixes.len() <= PREFIXES_COMPARED_MAX
        && outer.covers_prefixes(inner)
        && !inner.prefixes.iter().any(equal)
}

/// The protocols and ports that both have, in words; `None` where they have none.
fn shared_part(a: &FlowTest, b: &FlowTest, protocols: ProtocolSet) -> Option<String> {
    let named: Vec<String> = Protocol::ALL
        .into_iter()
        .filter(|protocol| protocols.contains(*protocol))
        .map(|protocol| protocol.to_string())
        .collect();
    let shared: Vec<PortRange> = match (a.ports.is_empty(), b.ports.is_empty()) {
        (true, _) => b.ports.ranges().to_vec(),
        (_, true) => a.ports.ranges().to_vec(),
        (false, false) => {
            let pairs = a
                .ports
                .ranges()
                .iter()
                .flat_map(|x| b.ports.ranges().iter().map(move |y| (x, y)));
            pairs
                .filter_map(|(x, y)| PortRange::new(x.first().max(y.first()), x.last().min(y.last())))
                .collect()
        }
    };
    let any_port = a.ports.is_empty() && b.ports.is_empty();
    if named.is_empty() || !any_port && shared.is_empty() {
        return None;
    }
    let ports: Vec<String> = shared.iter().take(8).map(ToString::to_string).collect();
    let ports = if ports.is_empty() {
        String::new()
    } else {
        format!(" {}", ports.join(", "))
    };
    Some(format!("{}{ports}", named.join("/")))
}
