package sqlstore

// SystemEventsStatement is what SystemEvents asks the database.
var SystemEventsStatement = systemEvents
