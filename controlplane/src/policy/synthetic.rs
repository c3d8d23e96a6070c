//! Flows to synthetic addresses: judged by the name alone, and once more when it was resolved.
//!
//! A synthetic address says nothing but its name: no prefix matches it, whatever the rule. When the name's
//! connection is allowed, its dataplane looks the name up and asks again about the address found. That
//! judgement only takes back: an explicit deny and the guards stop it, and nobody is asked a second time.

use std::net::SocketAddr;

use vnet_proto::model::special::{is_private_or_special, judged};
use vnet_proto::model::{FlowKey, FlowMatch, FlowSubject, Guard};

use crate::policy::answer::Answer;
use crate::policy::eval::{Context, FlowDecision, Outcome, flow_answer};
use crate::policy::region::Region;

/// Whether a flow goes to a synthetic address.
pub(super) fn is_synthetic(flow: &FlowSubject) -> bool {
    flow.guards.contains(Guard::Synthetic)
}

/// Whether its name was resolved: the dialled address is another than the one that the guest sees.
fn is_resolved(flow: &FlowSubject) -> bool {
    judged(flow.dialled) != flow.key.peer.ip()
}

/// Decides a flow to a synthetic address, as far as it is resolved.
pub(super) fn decide(context: &Context<'_>, flow: &FlowSubject) -> FlowDecision {
    let found = FlowMatch {
        names_consulted: true,
        ..FlowMatch::exact(&flow.key)
    };
    if !is_resolved(flow) {
        return by_name(context, flow).into_decision(found);
    }
    FlowDecision {
        // Beside it, the same synthetic address may come to stand for another real one.
        once: true,
        ..by_address(context, flow).into_decision(found)
    }
}

/// Decides a flow that lives: by what its name was resolved to, and by the name. What is found against the address
/// comes first, since it outranks whatever let the name through.
pub(super) fn decide_live(context: &Context<'_>, flow: &FlowSubject) -> FlowDecision {
    if is_resolved(flow) {
        let found = decide(context, flow);
        if found.outcome != Outcome::Allow {
            return found;
        }
    }
    let unresolved = FlowSubject {
        dialled: flow.key.peer.ip(),
        ..flow.clone()
    };
    decide(context, &unresolved)
}

/// What is decided of the name. A rule with a name and prefixes is taken to match: whether it does shows when
/// the address is found.
fn by_name(context: &Context<'_>, flow: &FlowSubject) -> Answer {
    let mut region = Region::around(flow, context.guarded).trusting();
    let answer = flow_answer(context, flow, &mut region);
    if answer.outcome == Outcome::Ask && !flow.key.protocol.has_ports() {
        // A name's grant opens tcp and udp, so that there is no yes to give.
        let text = format!(
            "{} of a synthetic address needs a rule that names its name",
            flow.key.protocol
        );
        return answer.turned(Outcome::Deny, text);
    }
    answer
}

/// Whether the name was let through by a rule for some of its addresses alone. A grant for once that is spent
/// by now does not look so: without it, nothing allows the name either way.
fn allowed_for_other_addresses(context: &Context<'_>, flow: &FlowSubject) -> bool {
    let unresolved = FlowSubject {
        dialled: flow.key.peer.ip(),
        ..flow.clone()
    };
    let mut region = Region::around(&unresolved, context.guarded);
    let strict = flow_answer(context, &unresolved, &mut region);
    strict.outcome != Outcome::Allow && by_name(context, &unresolved).outcome == Outcome::Allow
}

fn by_address(context: &Context<'_>, flow: &FlowSubject) -> Answer {
    let address = judged(flow.dialled);
    let guards = flow.guards.without(Guard::Synthetic);
    let real = FlowSubject {
        key: FlowKey {
            peer: SocketAddr::new(address, flow.key.peer.port()),
            ..flow.key
        },
        dialled: flow.dialled,
        guards: if is_private_or_special(address) {
            guards.with(Guard::PrivateFromDns)
        } else {
            guards
        },
        ..flow.clone()
    };
    let mut region = Region::around(&real, context.guarded);
    let answer = flow_answer(context, &real, &mut region);
    let step = answer.reason.step.as_str();
    let name = flow.names.first().map(ToString::to_string).unwrap_or_default();
    let refused = match (answer.outcome, step) {
        (Outcome::Allow, _) => false,
        (Outcome::Deny | Outcome::Drop | Outcome::Ask, "guard") => true,
        // What nothing decides, or a rule would ask about, was allowed by its name.
        (Outcome::Ask, _) | (Outcome::Deny | Outcome::Drop, "default") => {
            allowed_for_other_addresses(context, flow)
        }
        (Outcome::Deny | Outcome::Drop, _) => true,
    };
    if !refused {
        let text = format!("{name} was allowed, and nothing denies {address}, which it stands for");
        return Answer::new(Outcome::Allow, "synthetic", name, text, String::new());
    }
    let outcome = match answer.outcome {
        Outcome::Ask => Outcome::Deny,
        other => other,
    };
    let text = format!("{name} stands for {address}: {}", answer.reason.text);
    answer.turned(outcome, text)
}
