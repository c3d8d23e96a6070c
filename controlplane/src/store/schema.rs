//! The SQLite schema: its versions, and the steps from each to the next.
//!
//! `PRAGMA user_version` holds the version. A step is never changed once released: a newer version
//! adds one.

/// Each step takes the schema from its index to the next version.
pub(super) const MIGRATIONS: &[&str] = &[
    "
    CREATE TABLE grants (
        id        TEXT PRIMARY KEY,
        message   BLOB NOT NULL,             -- vnet.v1.Grant
        instances TEXT NOT NULL              -- one attachment a line
    ) STRICT;
    CREATE TABLE policies (
        name     TEXT NOT NULL,
        revision INTEGER NOT NULL,
        message  BLOB NOT NULL,              -- vnet.v1.Policy
        PRIMARY KEY (name, revision)
    ) STRICT;
    CREATE TABLE vms (
        name     TEXT PRIMARY KEY,
        mode     INTEGER NOT NULL,           -- vnet.v1.Mode
        labels   TEXT NOT NULL,              -- a JSON object
        instance TEXT NOT NULL
    ) STRICT;
    CREATE TABLE events (
        sequence INTEGER PRIMARY KEY,
        time_us  INTEGER NOT NULL,           -- since 1970, in microseconds
        kind     INTEGER NOT NULL,           -- vnet.v1.EventKind
        message  BLOB NOT NULL               -- vnet.v1.Event
    ) STRICT;
    CREATE INDEX events_by_kind ON events (kind, sequence);
",
    "
    CREATE TABLE lists (
        sha256  TEXT PRIMARY KEY,            -- of the list's content, as vnet.v1.PolicyList says it
        content BLOB NOT NULL                -- compressed; once, however many revisions name it
    ) STRICT;
",
];

/// The version that this program writes.
pub(super) const VERSION: u32 = MIGRATIONS.len() as u32;
