//! Aliases: names that the answer to a lookup leads through, and that the guest did not ask for.
//!
//! What is decided is the name that was asked for. Of an alias only what is said explicitly counts: whatever refuses
//! its lookup, and is not the default action, refuses it, in the order of lookups. Anything else lets it pass, and
//! nobody is asked about it. The guard of DNS refuses where it would ask, and where the default action stands before
//! it: an address of another DNS server would else be had by an alias that nobody saw.

use vnet_proto::model::{LookupMatch, Name};

use crate::policy::answer::Answer;
use crate::policy::eval::{
    Context, LookupDecision, Outcome, first_rule_for_lookup, guarded_name, lookup_answer, refused_at_once,
};

/// Decides an alias. No grant is used by letting it pass.
pub(super) fn decide_alias(context: &Context<'_>, name: &Name) -> LookupDecision {
    let mut region = LookupMatch::Any;
    let answer = alias_answer(context, name, &mut region);
    let refused = answer.outcome != Outcome::Allow;
    let decision = answer.into_decision(region);
    if refused {
        return decision;
    }
    LookupDecision {
        // What lets it pass by a grant may be used up without anybody's saying so.
        once: decision.grant.is_some(),
        grant: None,
        budget: None,
        would_deny: false,
        ..decision
    }
}

fn alias_answer(context: &Context<'_>, name: &Name, region: &mut LookupMatch) -> Answer {
    let policy = context.policy;
    if let Some(answer) = refused_at_once(context, name, region) {
        return answer;
    }
    if let Some(resolvers) = &policy.resolvers {
        let names = resolvers.names();
        *region = names.narrow(std::mem::replace(region, LookupMatch::Any), name);
        if names.contains(name) {
            *region = LookupMatch::Exact(name.clone());
            return guarded(context, name);
        }
    }
    // Rules that let lookups through matter only where they stand before one that refuses some.
    let mut until = None;
    if policy.rules.iter().any(|(list, _)| list.refuses_lookups())
        && let Some(rule) = first_rule_for_lookup(context, name, region)
    {
        if rule.action.refuses() {
            return Answer::of_refusing_rule(context, rule);
        }
        until = rule.until;
    }
    Answer {
        until,
        ..passed(name)
    }
}

/// A name of another DNS server is opened by what opens its lookup, and by nothing less: where the default action
/// would deny that, the guard does so here.
fn guarded(context: &Context<'_>, name: &Name) -> Answer {
    let answer = lookup_answer(context, name, &mut LookupMatch::Any);
    match (answer.outcome, answer.reason.step.as_str()) {
        (Outcome::Allow, _) | (Outcome::Ask, "rule") => Answer {
            until: answer.until,
            grant: answer.grant,
            ..passed(name)
        },
        (Outcome::Deny | Outcome::Drop, "rule") => answer,
        (Outcome::Deny | Outcome::Drop | Outcome::Ask, _) => {
            let answer = guarded_name(context, name);
            let text = answer.reason.text.clone();
            answer.turned(Outcome::Deny, text)
        }
    }
}

fn passed(name: &Name) -> Answer {
    let text = format!("nothing refuses {name}, which the answer to an allowed lookup has as an alias");
    Answer::new(Outcome::Allow, "alias", String::new(), text, String::new())
}
