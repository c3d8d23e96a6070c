//! Identities. Numbers that name something are never bare integers.

use std::fmt;

use crate::model::Malformed;
use crate::v1;

macro_rules! identity {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

identity!(
    /// A guest's handle in its dataplane's life. Its name is a text beside it.
    VmId(u32)
);
identity!(
    /// A miss, unique in its dataplane's life and growing.
    MissId(u64)
);
identity!(
    /// A flow, unique in its dataplane's life.
    FlowId(u64)
);
identity!(
    /// A Revoke, Cut or Command, unique in its session.
    CommandId(u64)
);

/// The point in a controlplane's history that a decision was made at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Epoch {
    /// Random for each start of a controlplane.
    pub incarnation: u64,
    /// Raised by every change that can alter a decision.
    pub counter: u64,
}

impl Epoch {
    /// The first epoch of a controlplane that starts now.
    pub fn first(random: u64) -> Self {
        Self {
            incarnation: random.max(1),
            counter: 1,
        }
    }

    /// The next epoch of the same incarnation.
    #[must_use]
    pub fn next(self) -> Self {
        Self {
            counter: self.counter + 1,
            ..self
        }
    }

    /// Whether something decided under `self` still stands when `in_force` is. One of another
    /// incarnation never does.
    pub fn stands_under(self, in_force: Epoch) -> bool {
        self.incarnation == in_force.incarnation && self.counter >= in_force.counter
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08x}.{}", self.incarnation >> 32, self.counter)
    }
}

impl TryFrom<v1::Epoch> for Epoch {
    type Error = Malformed;

    fn try_from(message: v1::Epoch) -> Result<Self, Malformed> {
        if message.incarnation == 0 {
            return Err(Malformed::Missing {
                field: "epoch.incarnation",
            });
        }
        Ok(Self {
            incarnation: message.incarnation,
            counter: message.counter,
        })
    }
}

impl From<Epoch> for v1::Epoch {
    fn from(epoch: Epoch) -> Self {
        Self {
            incarnation: epoch.incarnation,
            counter: epoch.counter,
        }
    }
}
