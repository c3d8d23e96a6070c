//! Approvals: pending requests, from the first ask to the answer.
//!
//! [`PendingTable`] is the whole state, and time is an argument. What a miss deserves is decided by
//! [`crate::policy`]; making and keeping the grant that an answer yields is the caller's.

mod ask;
mod request;
mod scope;
mod table;

#[cfg(test)]
mod tests;

pub use ask::{
    Answer, AnswerError, Answered, Ask, AskForward, AskOutcome, Change, Changes, FindError, Limit, MissEnd,
    Released,
};
pub use request::{Asked, HeldMiss, MissRef, PendingId, PendingState, Request, Scope};
pub use table::{
    HELD_PER_VM_MAX, HOLD_GRACE, LIFE, NAMES_PER_REQUEST_MAX, OPEN_MAX, OPEN_PER_VM_MAX, PendingTable,
    RATE_SPAN, RECENT_MAX, RETIRED_FOR, RETIRED_MAX,
};
