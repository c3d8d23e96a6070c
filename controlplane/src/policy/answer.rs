//! Answers in words: what each step of a decision says, why, and what would change it.
//!
//! A reason travels with a verdict to every flow that its match covers, and is told of each of them: it never says
//! the port, address or name of the one that it was made for ("it").

use std::sync::Arc;
use std::time::SystemTime;

use vnet_proto::model::special::judged;
use vnet_proto::model::{FlowSubject, Guard, Mode, Name, NameDemand, Reason, Target};

use crate::grant::{Grant, Lifetime};
use crate::policy::eval::{Context, Decision, Outcome};
use crate::policy::{DefaultAction, FlowTest, Rule, RuleAction};

pub(super) fn guarded(context: &Context<'_>, flow: &FlowSubject, guard: Guard) -> Answer {
    let target = Target::of_flow(&flow.key);
    let address = flow.key.peer.ip();
    let what = match guard {
        Guard::Metadata => "it is a link-local or metadata address".to_owned(),
        Guard::Host if judged(flow.dialled) != address => {
            format!("it stands for {}, an address of the host itself", flow.dialled)
        }
        Guard::Host => "it is an address of the host itself".to_owned(),
        Guard::PrivateFromDns => "it is a private address that was learned from DNS".to_owned(),
        Guard::Guest => match context.peer {
            Some(peer) => format!("it is the address of VM {}", peer.name),
            None => "it is an address for guests".to_owned(),
        },
        Guard::Daemon => "a vnet daemon listens there".to_owned(),
        Guard::Synthetic => "it is a synthetic address".to_owned(),
    };
    let text = format!("{what}, which only a rule or grant that names it opens");
    let remedy = format!("vnetctl allow {target} --vm {}", context.vm.name);
    let outcome = if context.policy.mode() == Some(Mode::Ask) {
        Outcome::Ask
    } else {
        Outcome::Deny
    };
    Answer::new(outcome, "guard", guard.to_string(), text, remedy)
}

/// The answer of the guard of DNS.
pub(super) fn guarded_dns(context: &Context<'_>, text: String, target: &Target) -> Answer {
    let outcome = if context.policy.mode() == Some(Mode::Ask) {
        Outcome::Ask
    } else {
        Outcome::Deny
    };
    let remedy = allow_remedy(context, target);
    Answer::new(outcome, "guard", DNS_GUARD.to_owned(), text, remedy)
}

/// The subject of reasons of that guard.
const DNS_GUARD: &str = "dns";

pub(super) fn default_answer(context: &Context<'_>, default: DefaultAction, target: &Target) -> Answer {
    let policy = context.policy;
    let name = match policy.policy_name() {
        "" => String::new(),
        name => format!(" of policy {name}"),
    };
    let remedy = || allow_remedy(context, target);
    let answer = |outcome, text, remedy| Answer::new(outcome, "default", default.to_string(), text, remedy);
    match (default, policy.mode()) {
        (DefaultAction::Allow, None) => {
            let text = "no policy and no mode is given, so that the network is open".to_owned();
            answer(
                Outcome::Allow,
                text,
                format!("vnetctl vm mode {} ask", context.vm.name),
            )
        }
        (DefaultAction::Allow, Some(_)) => answer(
            Outcome::Allow,
            format!("the default action{name} allows it"),
            String::new(),
        ),
        (DefaultAction::Deny, Some(Mode::Ask)) => answer(
            Outcome::Ask,
            "nothing allows it, and mode ask asks".to_owned(),
            remedy(),
        ),
        (DefaultAction::Deny, Some(Mode::Observe)) => {
            let text = format!("mode observe allows it, which the default action{name} would deny");
            Answer {
                would_deny: true,
                ..answer(Outcome::Allow, text, remedy())
            }
        }
        (DefaultAction::Deny, _) => {
            let text = format!("nothing allows it, and the default action{name} denies");
            answer(Outcome::Deny, text, remedy())
        }
    }
}

fn allow_remedy(context: &Context<'_>, target: &Target) -> String {
    let target = match target {
        Target::Name { pattern, .. } => format!("domain '{pattern}'"),
        Target::Address { .. } | Target::Forward(_) => target.to_string(),
    };
    format!("vnetctl allow {target} --vm {}", context.vm.name)
}

/// An answer before its match.
pub(super) struct Answer {
    pub(super) outcome: Outcome,
    pub(super) reason: Reason,
    pub(super) would_deny: bool,
    pub(super) grant: Option<Arc<Grant>>,
    /// When the rule that it passed, or rests on, ends.
    pub(super) until: Option<SystemTime>,
    pub(super) name_demand: NameDemand,
    pub(super) names: Vec<Name>,
    pub(super) remedy: String,
}

impl Answer {
    pub(super) fn new(outcome: Outcome, step: &str, subject: String, text: String, remedy: String) -> Self {
        Self {
            outcome,
            reason: Reason::new(step, subject, text),
            would_deny: false,
            grant: None,
            until: None,
            name_demand: NameDemand::Off,
            names: Vec::new(),
            remedy,
        }
    }

    /// With what the flow must say of its name, if the test that let it through read names.
    pub(super) fn resting_on(self, test: &FlowTest, demand: NameDemand, flow: &FlowSubject) -> Self {
        match &test.names {
            Some(names) if demand != NameDemand::Off => Self {
                name_demand: demand,
                names: flow
                    .names
                    .iter()
                    .filter(|name| names.contains(name))
                    .cloned()
                    .collect(),
                ..self
            },
            Some(_) | None => self,
        }
    }

    pub(super) fn of_grant(outcome: Outcome, grant: &Arc<Grant>) -> Self {
        let done = if outcome == Outcome::Allow {
            "allows"
        } else {
            "denies"
        };
        let by = if grant.creator.is_empty() {
            String::new()
        } else {
            format!(" by {}", grant.creator)
        };
        let text = format!("grant {}{by} {done} {}", grant.id, grant.target);
        let remedy = format!("vnetctl grants revoke {}", grant.id);
        let answer = Self::new(outcome, "grant", grant.id.to_string(), text, remedy);
        Self {
            grant: Some(Arc::clone(grant)),
            ..answer
        }
    }

    pub(super) fn of_rule(context: &Context<'_>, outcome: Outcome, rule: &Rule) -> Self {
        let place = place(context, rule);
        let done = match outcome {
            Outcome::Allow => "allows",
            Outcome::Deny => "denies",
            Outcome::Drop => "drops",
            Outcome::Ask => "asks for",
        };
        let comment = if rule.comment.is_empty() {
            String::new()
        } else {
            format!(" ({})", rule.comment)
        };
        let until = match rule.until {
            Some(until) => format!(" until {}", humantime::format_rfc3339_seconds(until)),
            None => String::new(),
        };
        let text = format!("{place} {done} it{until}{comment}");
        let remedy = format!("change {place}");
        Self {
            until: rule.until,
            ..Self::new(outcome, "rule", rule.label.clone(), text, remedy)
        }
    }

    pub(super) fn of_refusing_rule(context: &Context<'_>, rule: &Rule) -> Self {
        let outcome = match rule.action {
            RuleAction::Drop => Outcome::Drop,
            RuleAction::Allow | RuleAction::Deny | RuleAction::Ask => Outcome::Deny,
        };
        Self::of_rule(context, outcome, rule)
    }

    pub(super) fn asked_by_rule(context: &Context<'_>, rule: &Rule, target: &Target) -> Self {
        let answer = Self::of_rule(context, Outcome::Ask, rule);
        let remedy = allow_remedy(context, target);
        if context.policy.mode() == Some(Mode::Observe) {
            let text = format!("mode observe allows what {} would ask for", place(context, rule));
            let reason = Reason {
                text,
                ..answer.reason
            };
            return Self {
                outcome: Outcome::Allow,
                would_deny: true,
                reason,
                remedy,
                ..answer
            };
        }
        Self { remedy, ..answer }
    }

    pub(super) fn once(&self) -> bool {
        self.outcome == Outcome::Allow && self.grant.as_ref().is_some_and(|g| g.lifetime == Lifetime::Once)
    }

    /// Another outcome at the same step, with a sentence of its own.
    pub(super) fn turned(self, outcome: Outcome, text: String) -> Self {
        Self {
            outcome,
            reason: Reason { text, ..self.reason },
            ..self
        }
    }

    pub(super) fn into_decision<M>(self, found: M) -> Decision<M> {
        let once = self.once();
        let grant = self.grant.as_deref();
        Decision {
            outcome: self.outcome,
            reason: self.reason,
            found,
            would_deny: self.would_deny,
            once,
            budget: grant.and_then(Grant::budget_left),
            expires_at: grant
                .and_then(|g| g.expires_at)
                .into_iter()
                .chain(self.until)
                .min(),
            name_demand: self.name_demand,
            names: self.names,
            synthetic_only: false,
            grant: grant.map(|g| g.id.clone()),
            remedy: self.remedy,
        }
    }
}

fn place(context: &Context<'_>, rule: &Rule) -> String {
    if rule.line == 0 {
        rule.label.clone()
    } else {
        format!(
            "rule {} of policy {} (line {})",
            rule.label,
            context.policy.policy_name(),
            rule.line
        )
    }
}
