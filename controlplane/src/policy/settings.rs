//! What a policy says beside its rules: how lookups are answered and limited, which guards stand, what people
//! may answer, and what holds without a controlplane. A profile says some of it anew, for some VMs.

use std::fmt;
use std::time::Duration;

use vnet_proto::model::{Mode, VmSelector};

use crate::policy::DefaultAction;

/// The longest time to live that a guest is told where nothing else is said.
pub const TTL_MAX_DEFAULT: Duration = Duration::from_secs(3_600);
/// The longest that a policy may say.
pub const TTL_MAX: Duration = Duration::from_secs(24 * 3_600);
/// Lookups in a second where nothing else is said: several browsers that start with all their tabs stay
/// below it.
pub const QUERIES_PER_SECOND: u32 = 500;
/// Lookups in a minute where nothing else is said.
pub const QUERIES_PER_MINUTE: u32 = 6_000;
/// Different names of one registrable domain in a minute where nothing else is said: a page with all that it
/// draws in stays below it by far, and a package manager asks for a handful.
pub const NAMES_PER_DOMAIN: u32 = 300;
/// The highest of these three that a policy may say.
pub const QUERIES_MAX: u32 = 100_000;
/// Open requests of a VM, and requests in a minute, that a policy may say at most.
pub const PENDING_MAX: u32 = 1_024;
/// The shortest time that `onControllerLoss` may say: the lease of a cached verdict.
pub const CONTROLLER_LOSS_MIN: Duration = Duration::from_secs(60);
/// The longest.
pub const CONTROLLER_LOSS_MAX: Duration = Duration::from_secs(24 * 3_600);

/// How a lookup that is denied is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Denial {
    /// REFUSED.
    #[default]
    Refused,
    /// NXDOMAIN.
    NxDomain,
    /// SERVFAIL.
    ServFail,
}

impl Denial {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Refused, Self::NxDomain, Self::ServFail];
}

impl fmt::Display for Denial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Refused => "refused",
            Self::NxDomain => "nxdomain",
            Self::ServFail => "servfail",
        })
    }
}

/// What becomes of a guard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GuardAction {
    /// It stands.
    Deny,
    /// It does not: a broad rule opens what is under it.
    Off,
}

impl GuardAction {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Deny, Self::Off];
}

impl fmt::Display for GuardAction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Deny => "deny",
            Self::Off => "off",
        })
    }
}

/// What becomes of DNS to other servers than the gateway.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DnsGuard {
    /// It is denied, but for what a rule or grant names.
    #[default]
    Deny,
    /// The gateway answers what goes to port 53; the rest is denied likewise.
    Redirect,
    /// It is like any other flow.
    Off,
}

impl DnsGuard {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Deny, Self::Redirect, Self::Off];
}

impl fmt::Display for DnsGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Deny => "deny",
            Self::Redirect => "redirect",
            Self::Off => "off",
        })
    }
}

/// How much a person's yes may cover.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum WidestScope {
    /// One port of one host or name.
    Port,
    /// One host or name.
    Host,
    /// All names below one registrable domain.
    Subdomains,
    /// Whatever is asked for, prefixes included.
    Any,
}

impl WidestScope {
    /// Those that are written.
    pub const ALL: [Self; 4] = [Self::Port, Self::Host, Self::Subdomains, Self::Any];
}

impl fmt::Display for WidestScope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Port => "port",
            Self::Host => "host",
            Self::Subdomains => "subdomains",
            Self::Any => "any",
        })
    }
}

/// The longest that a person's yes may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LongestLifetime {
    /// For so long, or once.
    For(Duration),
    /// Until the VM stops, or any time.
    UntilVmStops,
    /// For ever.
    Forever,
}

impl fmt::Display for LongestLifetime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::For(time) => write!(f, "{}", humantime::format_duration(*time)),
            Self::UntilVmStops => f.write_str("untilVmStops"),
            Self::Forever => f.write_str("forever"),
        }
    }
}

/// Settings as written; what is `None` was left out.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Settings {
    /// `dns.ttl.min`.
    pub ttl_min: Option<Duration>,
    /// `dns.ttl.max`.
    pub ttl_max: Option<Duration>,
    /// `dns.denyWith`.
    pub deny_with: Option<Denial>,
    /// `dns.denyWith.text`.
    pub deny_text: Option<String>,
    /// `dns.limits.queriesPerSecond`.
    pub queries_per_second: Option<u32>,
    /// `dns.limits.queriesPerMinute`.
    pub queries_per_minute: Option<u32>,
    /// `dns.limits.namesPerDomain`.
    pub names_per_domain: Option<u32>,
    /// `guards.metadata`.
    pub metadata: Option<GuardAction>,
    /// `guards.host`.
    pub host: Option<GuardAction>,
    /// `guards.privateFromDns`.
    pub private_from_dns: Option<GuardAction>,
    /// `guards.guests`.
    pub guests: Option<GuardAction>,
    /// `guards.dns`.
    pub dns_guard: Option<DnsGuard>,
    /// `approvals.maxPendingPerVm`.
    pub max_pending: Option<u32>,
    /// `approvals.maxRequestsPerMinute`.
    pub max_per_minute: Option<u32>,
    /// `approvals.maxLifetime`.
    pub max_lifetime: Option<LongestLifetime>,
    /// `approvals.maxScope`.
    pub max_scope: Option<WidestScope>,
    /// `onControllerLoss`.
    pub controller_loss: Option<Duration>,
}

impl Settings {
    /// With what is left out taken from `other`.
    #[must_use]
    pub fn or(self, other: &Self) -> Self {
        Self {
            ttl_min: self.ttl_min.or(other.ttl_min),
            ttl_max: self.ttl_max.or(other.ttl_max),
            deny_with: self.deny_with.or(other.deny_with),
            deny_text: self.deny_text.or_else(|| other.deny_text.clone()),
            queries_per_second: self.queries_per_second.or(other.queries_per_second),
            queries_per_minute: self.queries_per_minute.or(other.queries_per_minute),
            names_per_domain: self.names_per_domain.or(other.names_per_domain),
            metadata: self.metadata.or(other.metadata),
            host: self.host.or(other.host),
            private_from_dns: self.private_from_dns.or(other.private_from_dns),
            guests: self.guests.or(other.guests),
            dns_guard: self.dns_guard.or(other.dns_guard),
            max_pending: self.max_pending.or(other.max_pending),
            max_per_minute: self.max_per_minute.or(other.max_per_minute),
            max_lifetime: self.max_lifetime.or(other.max_lifetime),
            max_scope: self.max_scope.or(other.max_scope),
            controller_loss: self.controller_loss.or(other.controller_loss),
        }
    }

    /// The bounds of times to live.
    pub fn ttl(&self) -> (Duration, Duration) {
        let max = self.ttl_max.unwrap_or(TTL_MAX_DEFAULT);
        (self.ttl_min.unwrap_or_default().min(max), max)
    }
}

/// Settings for some VMs, before the document's own.
#[derive(Debug, Clone)]
pub struct Profile {
    /// Its name, for people.
    pub label: String,
    /// Which VMs it is for.
    pub vms: VmSelector,
    /// In place of the document's.
    pub mode: Option<Mode>,
    /// In place of the document's.
    pub default_action: Option<DefaultAction>,
    /// In place of the document's `dns.defaultAction`.
    pub lookup_default: Option<DefaultAction>,
    /// In place of the document's.
    pub approval_timeout: Option<Duration>,
    /// In place of the document's, each.
    pub settings: Settings,
    /// Where it stands in its document, from 1.
    pub line: u32,
    /// The column there, from 1.
    pub column: u32,
}
