package console_test

// screenshots are the pictures of README.md and docs/console.md.
func screenshots(b *browser, dir, key, vkey string) {
	b.t.Helper()
	b.do(`await page.setViewportSize({ width: 1200, height: 760 })
		await page.emulateMedia({ colorScheme: 'light', reducedMotion: 'reduce' })
		const shoot = async (path, name) => { if (path !== null) await page.goto(BASE + '/console/' + path); await page.screenshot({ path: DIR + '/' + name + '.png', animations: 'disabled' }) }
		await shoot(null, 'verify')
		await shoot('', 'overview')
		await shoot('keys/' + KEY, 'key')
		await shoot('events', 'events')
		await page.emulateMedia({ colorScheme: 'dark', reducedMotion: 'reduce' })
		await page.setViewportSize({ width: 390, height: 760 })
		await shoot('enrollments', 'narrow')
		await page.goto(BASE + '/console/verify?event=')`, "DIR", dir, "KEY", key)
	b.do(`await page.emulateMedia({ colorScheme: 'light', reducedMotion: 'reduce' })
		await page.setViewportSize({ width: 1200, height: 760 })
		await page.goto(BASE + '/console/keys/' + KEY)
		await page.click('.timeline li:first-child >> text=verify')
		await page.fill('#verify-key', VKEY)`, "KEY", key, "VKEY", vkey)
}
