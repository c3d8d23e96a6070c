//! Forwards that VMs ask for themselves: `forwards:` of a policy, and the decision.
//!
//! First answer wins: modes `block` and `quarantine`; grants that deny; where neither a policy nor a mode is in force,
//! yes to everything, as under gvproxy; addresses beyond loopback, no; rules in order; grants that allow; a rule that
//! asks, and mode `ask`; else no. So a denial is never overruled.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use vnet_proto::model::{
    ForwardTarget, ForwardTargetError, Mode, PortRange, Protocol, Reason, Target, VmSelector,
};

use crate::grant::Grant;
use crate::policy::{Context, Outcome, PortSet};

/// Rules of `forwards:` that a document may have.
pub const FORWARD_RULES_MAX: usize = 1_000;

/// What a rule of `forwards:` does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ForwardAction {
    /// Opens it.
    Allow,
    /// Refuses it.
    Deny,
    /// Asks a person.
    Ask,
}

impl ForwardAction {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Allow, Self::Deny, Self::Ask];
}

impl fmt::Display for ForwardAction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Allow => "allow",
            Self::Deny => "deny",
            Self::Ask => "ask",
        })
    }
}

/// Ports of one address of loopback, or of each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ListenRange {
    /// `None`: any address of loopback, of either family.
    pub address: Option<IpAddr>,
    /// Which ports; `None`: any.
    pub ports: Option<PortRange>,
}

impl ListenRange {
    fn has(self, listen: SocketAddr) -> bool {
        self.address.is_none_or(|address| address == listen.ip())
            && self.ports.is_none_or(|ports| ports.contains(listen.port()))
    }
}

/// One rule of `forwards:`.
#[derive(Debug, Clone)]
pub struct ForwardRule {
    /// Its name, or `forwards[N]` by its place, counted from zero.
    pub label: String,
    /// What it does.
    pub action: ForwardAction,
    /// `None`: tcp and udp.
    pub protocol: Option<Protocol>,
    /// Where on the host; empty: anywhere on loopback.
    pub listen: Vec<ListenRange>,
    /// Which of the VM's ports; empty: any.
    pub guest_ports: PortSet,
    /// Which VMs it is for; `None`: all.
    pub vms: Option<VmSelector>,
    /// Its author's words.
    pub comment: String,
    /// Where it stands in its document, from 1.
    pub line: u32,
    /// The column there, from 1.
    pub column: u32,
}

impl ForwardRule {
    /// Whether it is about a forward.
    pub fn matches(&self, forward: &ForwardTarget) -> bool {
        self.protocol
            .is_none_or(|protocol| protocol == forward.protocol())
            && (self.listen.is_empty() || self.listen.iter().any(|range| range.has(forward.listen())))
            && (self.guest_ports.is_empty() || self.guest_ports.range_of(forward.guest_port()).is_some())
    }
}

/// What comes of a forward that a VM asks for.
#[derive(Debug, Clone)]
pub struct ForwardDecision {
    /// What is done; never [`Outcome::Drop`].
    pub outcome: Outcome,
    /// The step, subject and sentence behind it.
    pub reason: Reason,
    /// The grant that it rests on.
    pub grant: Option<Arc<Grant>>,
    /// What is asked for, where it is something that can be asked for.
    pub target: Option<ForwardTarget>,
    /// What would change the answer, in one sentence; empty where nothing would.
    pub remedy: String,
}

/// Decides a forward that a VM asks for, into itself.
pub fn decide_forward(
    context: &Context<'_>,
    protocol: Protocol,
    listen: SocketAddr,
    guest_port: u16,
) -> ForwardDecision {
    let checked = ForwardTarget::new(protocol, listen, guest_port);
    let target = checked.as_ref().ok().copied();
    let answer = |outcome, step: &str, subject: String, text: String| ForwardDecision {
        outcome,
        reason: Reason::new(step, subject, text),
        grant: None,
        target,
        remedy: match target {
            Some(target) if outcome != Outcome::Allow && !matches!(step, "mode" | "rule" | "grant") => {
                format!(
                    "vnetctl allow {} --vm {}",
                    Target::Forward(target),
                    context.vm.name
                )
            }
            _ => String::new(),
        },
    };
    let of_grant = |outcome, grant: &Arc<Grant>| {
        let verb = if outcome == Outcome::Allow {
            "allows"
        } else {
            "denies"
        };
        let text = format!("grant {} {verb} it", grant.id);
        ForwardDecision {
            grant: Some(Arc::clone(grant)),
            ..answer(outcome, "grant", grant.id.0.clone(), text)
        }
    };
    let of_rule = |outcome, verb: &str, rule: &ForwardRule| {
        let comment = if rule.comment.is_empty() {
            String::new()
        } else {
            format!(" ({})", rule.comment)
        };
        let text = format!("rule {} {verb} it{comment}", rule.label);
        answer(outcome, "rule", rule.label.clone(), text)
    };
    let granted = |grants: &'_ [Arc<Grant>]| {
        let fits = |grant: &&Arc<Grant>| target.is_some_and(|it| grant.target == Target::Forward(it));
        grants.iter().find(fits).cloned()
    };

    let mode = context.policy.mode();
    if let Some(mode @ (Mode::Block | Mode::Quarantine)) = mode {
        let text = format!("mode {mode} lets the VM open nothing");
        return answer(Outcome::Deny, "mode", mode.to_string(), text);
    }
    if let Some(grant) = granted(&context.grants.forwards_denied) {
        return of_grant(Outcome::Deny, &grant);
    }
    if mode.is_none() {
        let text = "no policy and no mode is given, so that VMs open what they like".to_owned();
        return answer(Outcome::Allow, "default", "allow".to_owned(), text);
    }
    let target = match checked {
        Ok(target) => target,
        Err(error) => {
            let text = match error {
                ForwardTargetError::NotLoopback(_) if listen.port() != 0 => {
                    format!("{error}; under a policy or mode, ask for {}", on_loopback(listen))
                }
                _ => error.to_string(),
            };
            return answer(Outcome::Deny, "forwards", "loopback".to_owned(), text);
        }
    };
    let rule = context
        .policy
        .forwards()
        .iter()
        .find(|rule| rule.matches(&target));
    match rule {
        Some(rule) if rule.action == ForwardAction::Allow => return of_rule(Outcome::Allow, "allows", rule),
        Some(rule) if rule.action == ForwardAction::Deny => return of_rule(Outcome::Deny, "denies", rule),
        Some(_) | None => {}
    }
    if let Some(grant) = granted(&context.grants.forwards_allowed) {
        return of_grant(Outcome::Allow, &grant);
    }
    match (rule, mode) {
        (Some(rule), _) => of_rule(Outcome::Ask, "asks about", rule),
        (None, Some(Mode::Ask)) => answer(
            Outcome::Ask,
            "default",
            "deny".to_owned(),
            "no rule of forwards: allows it, and mode ask asks".to_owned(),
        ),
        (None, _) => answer(
            Outcome::Deny,
            "default",
            "deny".to_owned(),
            "no rule of forwards: allows it".to_owned(),
        ),
    }
}

/// The same port at the loopback's address of the same family.
pub fn on_loopback(listen: SocketAddr) -> SocketAddr {
    let address = match listen.ip().to_canonical() {
        IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
    };
    SocketAddr::new(address, listen.port())
}

/// The rule that a grant for a forward would come too late for.
pub(super) fn forward_overruled_by(context: &Context<'_>, target: &ForwardTarget) -> Option<String> {
    let rule = context
        .policy
        .forwards()
        .iter()
        .find(|rule| rule.matches(target))?;
    (rule.action == ForwardAction::Deny).then(|| rule.label.clone())
}
