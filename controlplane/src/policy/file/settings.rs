//! From the file's nodes to [`Settings`] and [`Profile`]s: `dns.ttl`, `dns.denyWith`, `dns.limits`, `guards`,
//! `approvals`, `onControllerLoss`, `profiles`.

use std::time::Duration;

use ipnet::IpNet;

use super::sets::Sets;
use super::{LIST_MAX, RULES_MAX, parse_duration, read_default, read_selector, read_text, read_timeout};
use crate::policy::keys::{self, MODES, Table};
use crate::policy::reader::{Fields, Reader};
use crate::policy::resolvers::Resolvers;
use crate::policy::settings::{
    CONTROLLER_LOSS_MAX, CONTROLLER_LOSS_MIN, Denial, DnsGuard, GuardAction, LongestLifetime, PENDING_MAX,
    Profile, QUERIES_MAX, Settings, TTL_MAX, WidestScope,
};
use crate::policy::yaml::{Node, Value};
use crate::policy::{EchGuard, NameGuards, QuicGuard};

/// Profiles that a document may have.
pub(crate) const PROFILES_MAX: usize = 256;

/// The longest that a yes may be limited to by a time.
const LIFETIME_MAX: Duration = Duration::from_secs(365 * 24 * 3_600);

/// Characters of the text of an Extended DNS Error: so many fit every answer.
const DENY_TEXT_BYTES_MAX: usize = 160;

/// `dns.ttl`, `dns.denyWith` and `dns.limits`.
pub(super) fn read_dns(reader: &mut Reader, fields: &mut Fields<'_>, key: &str, into: &mut Settings) {
    if let Some(node) = fields.take("ttl") {
        read_ttl(reader, node, &format!("{key}.ttl"), into);
    }
    if let Some(node) = fields.take("denyWith") {
        read_denial(reader, node, &format!("{key}.denyWith"), into);
    }
    if let Some(node) = fields.take("limits") {
        let key = format!("{key}.limits");
        let mut fields = reader.fields(node, &key, &keys::DNS_LIMITS);
        let mut count = |name: &str| {
            let node = fields.take(name)?;
            read_count(reader, node, &format!("{key}.{name}"), QUERIES_MAX)
        };
        into.queries_per_second = count("queriesPerSecond");
        into.queries_per_minute = count("queriesPerMinute");
        into.names_per_domain = count("namesPerDomain");
        if let (Some(second), Some(minute)) = (into.queries_per_second, into.queries_per_minute)
            && second > minute
        {
            let text = format!(
                "{key}.queriesPerSecond is {second}, which queriesPerMinute ({minute}) never lets happen; raise \
                 the one or lower the other"
            );
            reader.problem(node, text);
        }
    }
}

fn read_ttl(reader: &mut Reader, node: &Node, key: &str, into: &mut Settings) {
    let mut fields = reader.fields(node, key, &keys::DNS_TTL);
    let max = fields.take("max");
    let min = fields.take("min");
    let second = Duration::from_secs(1);
    into.ttl_max = max.and_then(|node| read_span(reader, node, &format!("{key}.max"), second, TTL_MAX));
    into.ttl_min =
        min.and_then(|node| read_span(reader, node, &format!("{key}.min"), Duration::ZERO, TTL_MAX));
    let (least, most) = (
        into.ttl_min.unwrap_or_default(),
        Settings {
            ttl_min: None,
            ..into.clone()
        }
        .ttl()
        .1,
    );
    if let Some(node) = min
        && least > most
    {
        let said = if max.is_some() {
            ""
        } else {
            ", which it is where it is left out"
        };
        reader.problem(
            node,
            format!(
                "{key}.min {} is more than {key}.max, {}{said}; raise max or lower min",
                node.value,
                humantime::format_duration(most)
            ),
        );
    }
}

fn read_denial(reader: &mut Reader, node: &Node, key: &str, into: &mut Settings) {
    if !matches!(node.value, Value::Map(_)) {
        into.deny_with = reader.one_of(node, key, &Denial::ALL);
        return;
    }
    let mut fields = reader.fields(node, key, &keys::DNS_DENIAL);
    into.deny_with = fields
        .take("code")
        .and_then(|node| reader.one_of(node, &format!("{key}.code"), &Denial::ALL));
    let text = fields.take("text");
    into.deny_text = text.and_then(|node| read_text(reader, node, "text"));
    if let (Some(node), Some(said)) = (text, &into.deny_text)
        && said.len() > DENY_TEXT_BYTES_MAX
    {
        let text = format!(
            "{key}.text is {} bytes long (at most {DENY_TEXT_BYTES_MAX}, so that it fits every answer)",
            said.len()
        );
        reader.problem(node, text);
    }
}

/// `guards`, but for `resolvers`.
fn read_guard_actions(reader: &mut Reader, fields: &mut Fields<'_>, key: &str, into: &mut Settings) {
    let mut guard = |name: &str| {
        let node = fields.take(name)?;
        // YAML's own word for false, as some parsers have it, is this one.
        if matches!(node.value, Value::Bool(false)) {
            return Some(GuardAction::Off);
        }
        reader.one_of(node, &format!("{key}.{name}"), &GuardAction::ALL)
    };
    into.metadata = guard("metadata");
    into.host = guard("host");
    into.private_from_dns = guard("privateFromDns");
    into.guests = guard("guests");
    into.dns_guard = fields.take("dns").and_then(|node| {
        if matches!(node.value, Value::Bool(false)) {
            return Some(DnsGuard::Off);
        }
        reader.one_of(node, &format!("{key}.dns"), &DnsGuard::ALL)
    });
}

/// `guards` of the document.
pub(super) fn read_guards(
    reader: &mut Reader,
    node: &Node,
    sets: &mut Sets,
    into: &mut Settings,
) -> (Resolvers, NameGuards) {
    let mut fields = reader.fields(node, "guards", &keys::GUARDS);
    read_guard_actions(reader, &mut fields, "guards", into);
    let ech = fields
        .take("ech")
        .and_then(|node| reader.one_of(node, "guards.ech", &EchGuard::ALL));
    let quic = fields
        .take("quic")
        .and_then(|node| reader.one_of(node, "guards.quic", &QuicGuard::ALL));
    let names = NameGuards {
        ech: ech.unwrap_or_default(),
        quic: quic.unwrap_or_default(),
    };
    let Some(node) = fields.take("resolvers") else {
        return (Resolvers::default(), names);
    };
    let nodes = reader.list(node, "guards.resolvers", LIST_MAX);
    let is_prefix = |node: &&Node| matches!(&node.value, Value::Text(text) if text.parse::<IpNet>().is_ok() || text.parse::<std::net::IpAddr>().is_ok());
    let (prefixes, others): (Vec<&Node>, Vec<&Node>) = nodes.iter().partition(is_prefix);
    let resolvers = sets.resolvers(reader, prefixes, &others, "guards.resolvers");
    (resolvers, names)
}

/// `approvals`.
pub(super) fn read_approvals(reader: &mut Reader, node: &Node, key: &str, into: &mut Settings) {
    let mut fields = reader.fields(node, key, &keys::APPROVALS);
    into.max_pending = fields
        .take("maxPendingPerVm")
        .and_then(|node| read_count(reader, node, &format!("{key}.maxPendingPerVm"), PENDING_MAX));
    into.max_per_minute = fields
        .take("maxRequestsPerMinute")
        .and_then(|node| read_count(reader, node, &format!("{key}.maxRequestsPerMinute"), PENDING_MAX));
    into.max_lifetime = fields
        .take("maxLifetime")
        .and_then(|node| read_lifetime(reader, node, &format!("{key}.maxLifetime")));
    into.max_scope = fields
        .take("maxScope")
        .and_then(|node| reader.one_of(node, &format!("{key}.maxScope"), &WidestScope::ALL));
}

fn read_lifetime(reader: &mut Reader, node: &Node, key: &str) -> Option<LongestLifetime> {
    match &node.value {
        Value::Text(text) if text == "forever" => return Some(LongestLifetime::Forever),
        Value::Text(text) if text == "untilVmStops" => return Some(LongestLifetime::UntilVmStops),
        _ => {}
    }
    let fitting = span(node).filter(|time| (Duration::from_secs(1)..=LIFETIME_MAX).contains(time));
    if fitting.is_none() {
        let text = format!(
            "{key} {} is not a lifetime (expected a time as \"12h\", untilVmStops or forever)",
            node.value
        );
        reader.problem(node, text);
    }
    fitting.map(LongestLifetime::For)
}

/// `onControllerLoss`.
pub(super) fn read_controller_loss(reader: &mut Reader, node: &Node, key: &str) -> Option<Duration> {
    if matches!(&node.value, Value::Text(text) if text == "deny") {
        return Some(CONTROLLER_LOSS_MIN);
    }
    let fitting = span(node).filter(|time| (CONTROLLER_LOSS_MIN..=CONTROLLER_LOSS_MAX).contains(time));
    if fitting.is_none() {
        let text = format!(
            "{key} {} is neither deny nor a time from 1m, the lease of what is allowed, to 24h (expected deny, or \
             one as \"10m\")",
            node.value
        );
        reader.problem(node, text);
    }
    fitting
}

/// `profiles`.
pub(super) fn read_profiles(reader: &mut Reader, node: &Node) -> Vec<Profile> {
    let nodes = reader.list(node, "profiles", PROFILES_MAX.min(RULES_MAX));
    let mut profiles = Vec::new();
    for (index, node) in nodes.iter().enumerate() {
        profiles.extend(read_profile(reader, node, index));
    }
    profiles
}

fn read_profile(reader: &mut Reader, node: &Node, index: usize) -> Option<Profile> {
    let what = format!("profiles[{index}]");
    let mut fields = reader.fields(node, &what, &keys::PROFILE);
    if !fields.are_a_mapping() {
        return None;
    }
    let label = fields
        .take("name")
        .and_then(|node| read_text(reader, node, "name"));
    let vms = match fields.take("vm") {
        Some(node) => read_selector(reader, node, &format!("{what}.vm")),
        None => {
            let text = format!(
                "{what} has no vm, which says whom it is for; what is for all VMs is the document's own"
            );
            reader.problem(node, text);
            None
        }
    };
    let mut settings = Settings::default();
    let mode = fields
        .take("mode")
        .and_then(|node| reader.one_of(node, &format!("{what}.mode"), &MODES));
    let default_action = fields
        .take("defaultAction")
        .and_then(|node| read_default(reader, node, &format!("{what}.defaultAction")));
    let approval_timeout = fields
        .take("approvalTimeout")
        .and_then(|node| read_timeout(reader, node));
    let mut inner = |reader: &mut Reader, key: &str, table: &Table| {
        let node = fields.take(key)?;
        let what = format!("{what}.{key}");
        Some((reader.fields(node, &what, table), what))
    };
    let mut lookup_default = None;
    if let Some((mut fields, key)) = inner(reader, "dns", &keys::PROFILE_DNS) {
        lookup_default = fields
            .take("defaultAction")
            .and_then(|node| read_default(reader, node, &format!("{key}.defaultAction")));
        read_dns(reader, &mut fields, &key, &mut settings);
    }
    if let Some((mut fields, key)) = inner(reader, "guards", &keys::PROFILE_GUARDS) {
        read_guard_actions(reader, &mut fields, &key, &mut settings);
    }
    if let Some(node) = fields.take("approvals") {
        read_approvals(reader, node, &format!("{what}.approvals"), &mut settings);
    }
    settings.controller_loss = fields
        .take("onControllerLoss")
        .and_then(|node| read_controller_loss(reader, node, &format!("{what}.onControllerLoss")));
    Some(Profile {
        label: label.unwrap_or(what),
        vms: vms?,
        mode,
        default_action,
        lookup_default,
        approval_timeout,
        settings,
        line: node.place.line,
        column: node.place.column,
    })
}

fn read_count(reader: &mut Reader, node: &Node, key: &str, most: u32) -> Option<u32> {
    let found = match &node.value {
        Value::Int(count) => u32::try_from(*count)
            .ok()
            .filter(|count| (1..=most).contains(count)),
        _ => None,
    };
    if found.is_none() {
        let text = format!("{key} is {} (expected a number from 1 to {most})", node.value);
        reader.problem(node, text);
    }
    found
}

fn read_span(
    reader: &mut Reader,
    node: &Node,
    key: &str,
    least: Duration,
    most: Duration,
) -> Option<Duration> {
    let fitting = span(node).filter(|time| (least..=most).contains(time));
    if fitting.is_none() {
        let text = format!(
            "{key} {} is not a time from {} to {} (expected seconds, or one as \"30s\")",
            node.value,
            humantime::format_duration(least),
            humantime::format_duration(most)
        );
        reader.problem(node, text);
    }
    fitting
}

fn span(node: &Node) -> Option<Duration> {
    match &node.value {
        Value::Int(seconds) => u64::try_from(*seconds).ok().map(Duration::from_secs),
        Value::Text(text) => parse_duration(text),
        _ => None,
    }
}
