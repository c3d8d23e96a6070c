//! What one VM is under: a document or none, rules of its own, and a mode, put together.

use std::net::Ipv4Addr;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, SystemTime};

use ipnet::{IpNet, Ipv4Net};
use vnet_proto::model::{Guard, Mode, Target};

use crate::clock::Now;
use crate::grant::VmView;
use crate::policy::index::Applies;
use crate::policy::resolvers::Resolvers;
use crate::policy::settings::{NAMES_PER_DOMAIN, QUERIES_PER_MINUTE, QUERIES_PER_SECOND};
use crate::policy::{
    Attachments, DefaultAction, DnsAnswer, DnsGuard, FlowTest, ForwardRule, GuardAction, ListCache,
    NameGuards, NameSet, Policy, PolicyError, PolicyErrors, PrefixSet, ProtocolSet, Rule, RuleAction,
    RuleList, Settings, file,
};

/// How long a packet is held when no policy says.
pub const APPROVAL_TIMEOUT: Duration = Duration::from_secs(30);

/// The name that a policy which a VM brought goes by.
pub const OWN_POLICY: &str = "own";

/// The flag that opens link-local addresses to a VM, as reasons name it.
pub(crate) const EC2_METADATA_ACCESS: &str = "--ec2-metadata-access";

/// A named policy's revision in force.
#[derive(Debug, Clone, Copy)]
pub struct PolicyInForce<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its revision.
    pub revision: u64,
    /// Its document.
    pub policy: &'a Policy,
}

/// Where a VM's mode may come from.
#[derive(Debug, Clone, Copy, Default)]
pub struct Modes {
    /// Set at run time (`vnetctl vm mode`); the strongest.
    pub set: Option<Mode>,
    /// Brought by the VM (`--mode`, `--secure-mode`).
    pub own: Option<Mode>,
}

/// Why it cannot be told which policy a VM is under. It is in mode `block` for that.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unsettled {
    /// The cause, as a sentence.
    pub why: String,
    /// What settles it, after "until".
    pub until: &'static str,
    /// How that is done.
    pub remedy: String,
}

impl Unsettled {
    /// As a reason; `so` is the sentence of what comes of it.
    pub fn text(&self, so: &str) -> String {
        format!("{}: until {}, {so}", self.why, self.until)
    }
}

/// What a VM brought along: a document, rules before the document's, or both.
#[derive(Debug, Clone)]
pub struct OwnPolicy {
    document: Option<Policy>,
    rules: Arc<RuleList>,
}

impl OwnPolicy {
    /// Checks what a VM brought. `None` is no document, which an empty one is not: that is refused as it is
    /// everywhere. Each of `rules` is as `allow tcp 192.0.2.7:80`.
    ///
    /// # Errors
    /// Everything that is wrong with either.
    pub fn parse(source: &str, document: Option<&str>, rules: &[String]) -> Result<Self, PolicyErrors> {
        Self::parse_with(
            source,
            document,
            rules,
            &Attachments::default(),
            &ListCache::default(),
        )
    }

    /// Likewise, with the lists that came along with the document.
    ///
    /// # Errors
    /// Everything that is wrong with any of them.
    pub fn parse_with(
        source: &str,
        document: Option<&str>,
        rules: &[String],
        lists: &Attachments,
        cache: &ListCache,
    ) -> Result<Self, PolicyErrors> {
        let mut problems = Vec::new();
        let parsed = document.and_then(|document| {
            let parsed = Policy::parse_with(source, document, lists, cache);
            parsed.map_err(|errors| problems.extend(errors.0)).ok()
        });
        if rules.len() > file::RULES_MAX {
            let text = format!("{} rules are given (at most {})", rules.len(), file::RULES_MAX);
            problems.push(PolicyError {
                source_name: "--allow".to_owned(),
                line: 1,
                column: 1,
                text,
            });
        }
        let mut own = Vec::new();
        for text in rules.iter().take(file::RULES_MAX) {
            match inline_rule(text) {
                Ok(rule) => own.push(Arc::new(rule)),
                Err(problem) => problems.push(problem),
            }
        }
        if problems.is_empty() {
            Ok(Self {
                document: parsed,
                rules: Arc::new(RuleList::new(own)),
            })
        } else {
            Err(PolicyErrors(problems))
        }
    }

    /// The document, if one was brought.
    pub fn document(&self) -> Option<&Policy> {
        self.document.as_ref()
    }
}

/// The rule that `--ec2-metadata-access` is.
static EC2_METADATA_RULE: LazyLock<Arc<RuleList>> = LazyLock::new(|| {
    let rule = Rule {
        label: EC2_METADATA_ACCESS.to_owned(),
        action: RuleAction::Allow,
        test: FlowTest {
            protocols: ProtocolSet::ALL,
            prefixes: PrefixSet::from_iter([IpNet::V4(LINK_LOCAL)]),
            ..FlowTest::default()
        },
        lookup_only: false,
        demand: None,
        until: None,
        vms: None,
        comment: String::new(),
        line: 0,
        column: 0,
    };
    Arc::new(RuleList::new(vec![Arc::new(rule)]))
});

/// What that rule opens (RFC 3927).
const LINK_LOCAL: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(169, 254, 0, 0), 16);

/// Reads `allow TARGET` or `deny TARGET`.
fn inline_rule(text: &str) -> Result<Rule, PolicyError> {
    let problem = |source_name: String, text: String| PolicyError {
        source_name,
        line: 1,
        column: 1,
        text,
    };
    let (word, target) = text
        .trim()
        .split_once(char::is_whitespace)
        .unwrap_or((text.trim(), ""));
    let action = match word {
        "allow" => RuleAction::Allow,
        "deny" => RuleAction::Deny,
        _ => {
            let text = format!("{word:?} is not the action of an inline rule (expected allow or deny)");
            return Err(problem("rule".to_owned(), text));
        }
    };
    let target: Target = target
        .parse()
        .map_err(|error| problem(format!("--{action}"), format!("{error}")))?;
    file::rule_of_target(action, &target).ok_or_else(|| {
        let text = format!("{target} is no destination (write it under forwards: of a policy file)");
        problem(format!("--{action}"), text)
    })
}

/// What one VM is under.
#[derive(Debug, Clone)]
pub struct Effective {
    pub(crate) name: String,
    pub(crate) revision: u64,
    /// Its own rules, then the document's, with those of each that apply.
    pub(crate) rules: Vec<(Arc<RuleList>, Applies)>,
    /// When the first of the rules that apply ends, of those that let through and of those that refuse.
    next_ends: [Option<SystemTime>; 2],
    /// The rules of `forwards:` that are for the VM.
    forwards: Vec<Arc<ForwardRule>>,
    pub(crate) allowed: Arc<NameSet>,
    pub(crate) blocked: Arc<NameSet>,
    pub(crate) default_action: DefaultAction,
    pub(crate) lookup_default: DefaultAction,
    /// Whether the lookups' default was said, and so is not the mode's to change.
    pub(crate) lookup_default_stands: bool,
    pub(crate) mode: Option<Mode>,
    synthetic_answers: bool,
    name_guards: NameGuards,
    approval_timeout: Duration,
    settings: Settings,
    /// What leads to other DNS servers; `None` where that is nothing that stops.
    pub(crate) resolvers: Option<Arc<Resolvers>>,
    unsettled: Option<Arc<Unsettled>>,
}

impl Effective {
    /// Puts together what a VM is under. `claimed` is the named policy that it falls to, if any.
    ///
    /// A document that the VM brought takes the place of the named one; rules that it brought stand
    /// before either's. Rules that are for other VMs, or over by `now`, are left out here, once, and not at
    /// each decision.
    pub fn compose(
        now: Now,
        vm: &VmView,
        claimed: Option<PolicyInForce<'_>>,
        own: Option<&OwnPolicy>,
        modes: Modes,
    ) -> Self {
        let own_document = own.and_then(OwnPolicy::document);
        let (name, revision) = match (own, claimed) {
            (Some(_), _) => (OWN_POLICY.to_owned(), 0),
            (None, Some(named)) => (named.name.to_owned(), named.revision),
            (None, None) => (String::new(), 0),
        };
        let document = own_document.or(claimed.map(|named| named.policy));
        let own_rules = own
            .map(|own| &own.rules)
            .filter(|rules| !rules.as_slice().is_empty());
        let profile = document.and_then(|d| d.profile_of(vm));
        let mode = modes.set.or(modes.own).or(document.and_then(|d| d.mode_of(vm)));
        // Whoever brought anything meant to be limited by it, even if nothing should have come of it.
        let open = document.is_none() && own.is_none() && mode.is_none();

        let applies = |rule: &Rule| {
            !rule.is_over(now) && rule.vms.as_ref().is_none_or(|s| s.matches(&vm.name, &vm.labels))
        };
        let lists = own_rules.into_iter().chain(document.map(|d| &d.rules));
        let rules: Vec<_> = lists
            .map(|list| (Arc::clone(list), Applies::of(list.as_slice(), applies)))
            .collect();
        let next_end = |refuses: bool| {
            let rules = rules.iter().flat_map(|(list, _)| list.as_slice());
            let ending = rules.filter(|rule| rule.action.refuses() == refuses && applies(rule));
            ending.filter_map(|rule| rule.until).min()
        };
        let next_ends = [next_end(false), next_end(true)];

        let fallback = if open {
            DefaultAction::Allow
        } else {
            DefaultAction::Deny
        };
        let default_action = profile
            .and_then(|p| p.default_action)
            .or(document.and_then(|d| d.default_action))
            .unwrap_or(fallback);
        let dns = document.and_then(|d| d.dns.as_ref());
        let said = profile
            .and_then(|p| p.lookup_default)
            .or(dns.and_then(|dns| dns.default_action));
        let draft = document.is_some_and(Policy::leaves_lookups_open);
        let lookup_default = match said {
            Some(said) => said,
            None if draft => DefaultAction::Allow,
            None => default_action,
        };
        let settings = profile.map(|p| p.settings.clone()).unwrap_or_default();
        let settings = match document {
            Some(document) => settings.or(&document.settings),
            None => settings,
        };
        let forwards = document.map(|d| d.forwards.as_slice()).unwrap_or_default();
        let is_for = |rule: &&Arc<ForwardRule>| {
            let vms = rule.vms.as_ref();
            vms.is_none_or(|vms| vms.matches(&vm.name, &vm.labels))
        };
        let guarded = !open && settings.dns_guard != Some(DnsGuard::Off);
        let resolvers = guarded.then(|| document.map(|d| Arc::clone(&d.resolvers)).unwrap_or_default());
        Self {
            unsettled: None,
            settings,
            resolvers,
            name,
            revision,
            rules,
            next_ends,
            forwards: forwards.iter().filter(is_for).cloned().collect(),
            allowed: dns.map(|dns| Arc::clone(&dns.allowed)).unwrap_or_default(),
            blocked: dns.map(|dns| Arc::clone(&dns.blocked)).unwrap_or_default(),
            default_action,
            lookup_default,
            lookup_default_stands: said.is_some(),
            mode: if open {
                None
            } else {
                Some(mode.unwrap_or(Mode::Enforce))
            },
            synthetic_answers: dns.is_some_and(|dns| dns.answer == DnsAnswer::Synthetic),
            name_guards: document.map(|d| d.name_guards).unwrap_or_default(),
            approval_timeout: profile
                .and_then(|p| p.approval_timeout)
                .or(document.and_then(|d| d.approval_timeout))
                .unwrap_or(APPROVAL_TIMEOUT),
        }
    }

    /// With why it is in mode `block`, where that is for want of a policy that can be told.
    pub fn with_unsettled(self, unsettled: Option<Unsettled>) -> Self {
        Self {
            unsettled: unsettled.map(Arc::new),
            ..self
        }
    }

    /// With 169.254.0.0/16 open where the VM has that (`--ec2-metadata-access`): by one rule more, behind all others.
    pub fn with_ec2_metadata_access(mut self, opens: bool) -> Self {
        if opens {
            let list = Arc::clone(&EC2_METADATA_RULE);
            let applies = Applies::of(list.as_slice(), |_| true);
            self.rules.push((list, applies));
        }
        self
    }

    /// Why it cannot be told which policy the VM is under; `None`: it can, or a mode was set meanwhile.
    pub fn unsettled(&self) -> Option<&Unsettled> {
        self.unsettled.as_deref()
    }

    /// The rules that apply, in order.
    pub fn rules(&self) -> impl Iterator<Item = &Arc<Rule>> {
        self.rules.iter().flat_map(|(list, applies)| {
            let numbered = list.as_slice().iter().zip(0u32..);
            numbered
                .filter(|(_, index)| applies.has(*index))
                .map(|(rule, _)| rule)
        })
    }

    /// The rules of `forwards:` that are for the VM, in order.
    pub fn forwards(&self) -> &[Arc<ForwardRule>] {
        &self.forwards
    }

    /// Whether a rule has ended since it was composed, so that it is to be composed anew.
    pub fn is_outdated(&self, now: Now) -> bool {
        let [opening, refusing] = self.next_ends;
        opening.is_some_and(|end| end <= now.steady) || refusing.is_some_and(|end| end <= now.wall)
    }

    /// The policy's name; [`OWN_POLICY`] for what the VM brought, empty for none.
    pub fn policy_name(&self) -> &str {
        &self.name
    }

    /// The policy's revision; zero for one that the VM brought, and for none.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// The mode in force; `None`: open, since neither a policy nor a mode nor a rule was given.
    pub fn mode(&self) -> Option<Mode> {
        self.mode
    }

    /// Whether nothing was given: open as under gvproxy, but for metadata and link-local addresses.
    pub fn is_open(&self) -> bool {
        self.mode.is_none()
    }

    /// The default action in force, before the mode makes a question of a deny.
    pub fn default_action(&self) -> DefaultAction {
        match self.mode {
            // Secure mode overrides a policy's `allow`.
            Some(Mode::Ask | Mode::Block | Mode::Quarantine) => DefaultAction::Deny,
            Some(Mode::Enforce | Mode::Observe) | None => self.default_action,
        }
    }

    /// The default action for lookups in force, before the mode makes a question of a deny.
    pub fn lookup_default(&self) -> DefaultAction {
        match self.mode {
            Some(Mode::Block | Mode::Quarantine) => DefaultAction::Deny,
            Some(Mode::Ask) if !self.lookup_default_stands => DefaultAction::Deny,
            Some(Mode::Ask | Mode::Enforce | Mode::Observe) | None => self.lookup_default,
        }
    }

    /// Whether lookups go out while addresses are closed: worth telling, since DNS carries data.
    pub fn leaves_dns_open(&self) -> bool {
        self.lookup_default() == DefaultAction::Allow && self.default_action() == DefaultAction::Deny
    }

    /// Whether lookups of addresses are answered with synthetic ones.
    pub fn synthetic_answers(&self) -> bool {
        self.synthetic_answers
    }

    /// How strictly flows are read that rest on a name.
    pub fn name_guards(&self) -> NameGuards {
        self.name_guards
    }

    /// How long a packet is held for an answer.
    pub fn approval_timeout(&self) -> Duration {
        self.approval_timeout
    }

    /// What its document and profile say beside rules.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Lookups of a second and a minute, and different names of one domain, that may go upstream; zero for
    /// any number.
    pub fn lookup_limits(&self) -> [u32; 3] {
        if self.is_open() {
            return [0; 3];
        }
        let said = &self.settings;
        [
            said.queries_per_second.unwrap_or(QUERIES_PER_SECOND),
            said.queries_per_minute.unwrap_or(QUERIES_PER_MINUTE),
            said.names_per_domain.unwrap_or(NAMES_PER_DOMAIN),
        ]
    }

    /// What becomes of DNS to other servers.
    pub fn dns_guard(&self) -> DnsGuard {
        if self.is_open() {
            return DnsGuard::Off;
        }
        self.settings.dns_guard.unwrap_or_default()
    }

    /// Whether the policy lets a guard stand.
    pub(crate) fn keeps(&self, guard: Guard) -> bool {
        let said = match guard {
            Guard::Metadata => self.settings.metadata,
            Guard::Host => self.settings.host,
            Guard::PrivateFromDns => self.settings.private_from_dns,
            Guard::Guest => self.settings.guests,
            Guard::Daemon | Guard::Synthetic => None,
        };
        said != Some(GuardAction::Off)
    }

    /// Whether the VM's link may be switched plainly to others of its kind.
    pub fn is_switch_open(&self) -> bool {
        self.is_open()
    }

    /// Whether forwards into the VM are cut.
    pub fn closes_forwards(&self) -> bool {
        self.mode == Some(Mode::Quarantine)
    }
}

/// The named policies that claim a VM by their `appliesTo`. More than one is an error of the caller's
/// to report; none means `default`.
pub fn claimants<'a>(vm: &VmView, policies: impl IntoIterator<Item = (&'a str, &'a Policy)>) -> Vec<&'a str> {
    policies
        .into_iter()
        .filter(|(_, p)| {
            p.applies_to
                .as_ref()
                .is_some_and(|s| s.matches(&vm.name, &vm.labels))
        })
        .map(|(name, _)| name)
        .collect()
}

/// What an omitted protocol means.
pub(crate) fn omitted_protocols(action: RuleAction) -> ProtocolSet {
    if action.refuses() {
        ProtocolSet::ALL
    } else {
        ProtocolSet::TCP_UDP
    }
}
